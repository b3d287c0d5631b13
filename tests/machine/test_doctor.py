"""The doctor's findings on simulated installations: fake packages on a temporary sys.path."""

import fcntl
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from gtpo_megatron.commands.cli import main
from gtpo_megatron.machine import doctor
from gtpo_megatron.machine.doctor import examine, print_findings
from gtpo_megatron.machine.packages import Finding, origin, required_package


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a fake distribution, and the files of its packages, in front of sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(name: str, version: str, *files: str, direct_url: dict[str, object] | None = None) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        if direct_url:
            (info / "direct_url.json").write_text(json.dumps(direct_url))
        for file in files:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).touch()
        return site

    return add


Install = Callable[..., Path]


def only(findings: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def test_pypis_apex_is_told_from_nvidias(install: Install) -> None:
    install("apex", "0.9.10.dev0", "apex/__init__.py", "apex/models.py")
    finding = only(list(doctor._apex()), "apex")
    assert finding.status == "warning" and "PyPI's apex is another project" in finding.found
    assert "pip uninstall apex" in finding.advice and "github.com/NVIDIA/apex" in finding.advice


def test_nvidias_apex_with_and_without_its_extensions(install: Install) -> None:
    source = {
        "url": "https://github.com/NVIDIA/apex",
        "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"},
    }
    site = install(
        "apex", "0.1", "apex/__init__.py", "apex/multi_tensor_apply/__init__.py", direct_url=source
    )
    finding = only(list(doctor._apex()), "apex")
    assert finding.status == "warning" and "without its CUDA extensions" in finding.found
    (site / "amp_C.py").touch()
    finding = only(list(doctor._apex()), "apex")
    assert finding.status == "ok" and finding.source == "https://github.com/NVIDIA/apex@012345678"
    assert "without fused_weight_gradient_mlp_cuda" in finding.found and "in one product" in finding.advice
    (site / "fused_weight_gradient_mlp_cuda.py").touch()
    finding = only(list(doctor._apex()), "apex")
    assert (
        "weight gradients are added to their buffer by their product" in finding.found and not finding.advice
    )


def test_the_transformer_engine_meta_wheel_without_its_core_is_an_error(install: Install) -> None:
    install("transformer-engine", "2.20.2", "transformer_engine/__init__.py")
    finding = only(list(doctor._transformer_engine()), "Transformer Engine")
    assert finding.status == "error" and "without its compiled core" in finding.found
    assert "pip uninstall transformer-engine" in finding.advice


@pytest.mark.parametrize(
    ("parts", "cuda", "status", "expected"),
    [
        ({"cu13": "2.20.2", "torch": "2.20.2"}, "13.0", "ok", "2.20.2, core for CUDA 13"),
        ({"cu13": "2.20.2"}, "13.0", "error", "without its PyTorch part"),
        (
            {"cu13": "2.19.0", "torch": "2.20.2"},
            "13.0",
            "error",
            "parts of different versions (transformer-engine 2.20.2, transformer-engine-cu13 2.19.0, transformer-engine-torch 2.20.2)",
        ),
        (
            {"cu12": "2.20.2", "cu13": "2.20.2", "torch": "2.20.2"},
            "13.0",
            "warning",
            "cores for two CUDA versions",
        ),
        (
            {"cu12": "2.20.2", "torch": "2.20.2"},
            "13.0",
            "warning",
            "its core is for CUDA 12, torch is built for CUDA 13.0",
        ),
    ],
)
def test_parts_of_transformer_engine(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, str],
    cuda: str,
    status: str,
    expected: str,
) -> None:
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: cuda)
    install("transformer-engine", "2.20.2", "transformer_engine/__init__.py")
    for part, version in parts.items():
        install(f"transformer-engine-{part}", version)
    finding = only(list(doctor._transformer_engine()), "Transformer Engine")
    assert (finding.status, expected in finding.found) == (status, True), finding.found


def test_transformer_engine_built_from_source(install: Install) -> None:
    files = ["__init__.py", "libtransformer_engine.so", "transformer_engine_torch.cpython-311.so"]
    install("transformer-engine", "2.20.2+abc", *(f"transformer_engine/{file}" for file in files))
    finding = only(list(doctor._transformer_engine()), "Transformer Engine")
    assert finding.status == "ok" and "core built from source" in finding.found


@pytest.mark.parametrize(
    ("core", "bridge", "status"),
    [
        ("0.16.1", "0.3.1", "ok"),
        ("0.19.2", "0.6.2", "ok"),
        ("0.19.2", "0.3.1", "warning"),
        ("0.15.0", "0.3.1", "warning"),
    ],
)
def test_megatron_comes_in_pairs(install: Install, core: str, bridge: str, status: str) -> None:
    install("megatron-core", core)
    install("megatron-bridge", bridge)
    finding = only(list(doctor._megatron_bridge()), "megatron-bridge")
    assert finding.status == status
    assert ("core 0.16 with bridge 0.3, core 0.19 with bridge 0.6" in finding.advice) == (status == "warning")


def test_a_megatron_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor,
        "_run",
        lambda command: doctor.subprocess.CompletedProcess(
            command, 1, "", "Traceback ...\nOSError: libcudnn.so is missing\n"
        ),
    )
    finding = only(list(doctor._megatron_core()), "megatron-core")
    assert finding.status == "error" and "does not import: OSError: libcudnn.so is missing" in finding.found


def test_a_version_other_than_the_pin_is_a_warning(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    site = install("gtpo-megatron", "9.9")
    with (site / "gtpo_megatron-9.9.dist-info" / "METADATA").open("a") as file:
        file.write(
            'Requires-Dist: sometool==1.2.3; python_version >= "3"\nRequires-Dist: sometool==1.0; python_version < "3"\n'
        )
    install("sometool", "1.2.0+local")
    finding = required_package("sometool", "")
    assert finding.status == "warning" and finding.found == "1.2.0+local, tested with 1.2.3"
    assert required_package("no-such-tool", "pip install it").status == "error"


def test_sglang_beside_the_trainer_and_in_its_own_environment(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert only(list(doctor._sglang()), "SGLang").advice == "make sglang"
    install("sglang", "0.5.23")
    assert "conflict with the trainer's" in only(list(doctor._sglang()), "SGLang").advice
    python = tmp_path / ".venv-sglang/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert [finding.status for finding in doctor._sglang()] == ["warning", "warning"]
    python.write_text("#!/bin/sh\necho 0.5.23 with torch 2.13.0\n")
    assert list(doctor._sglang())[-1] == Finding("SGLang", "ok", "0.5.23 with torch 2.13.0", ".venv-sglang")
    with Path(".venv-sglang.lock").open("w") as lock:  # as tools/setup_sglang_env.sh holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert list(doctor._sglang())[-1].found == "being installed at this moment"
    assert list(doctor._sglang())[-1].status == "ok"


def test_origin(install: Install) -> None:
    install("from-folder", "1.0", direct_url={"url": "file:///src/thing", "dir_info": {"editable": True}})
    site = install("from-system", "1.0")
    assert origin("from-folder") == "file:///src/thing"
    assert origin("from-system") == f"{site} (outside this environment)"
    assert origin("pytest").startswith("package index (")


def test_a_probe_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "PROBES", {"first": broken, "Python": doctor._python})
    assert examine() == [
        Finding("first", "warning", "cannot tell: OSError: no such device"),
        *doctor._python(),
    ]


def test_every_probe_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_run", lambda command: doctor.subprocess.CompletedProcess(command, 0, "fine\n", "")
    )
    findings = examine()
    assert not [finding for finding in findings if "cannot tell" in finding.found]
    names = {finding.name for finding in findings}
    assert {"Python", "cores", "memory", "torch", "CUDA", "NCCL", "megatron-core", "megatron-bridge"} <= names
    assert {"Transformer Engine", "apex", "SGLang"} <= names


def test_table_json_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        Finding("torch", "ok", "2.13.0", "index"),
        Finding("apex", "error", "broken [x]", "", "pip uninstall apex"),
    ]
    stream = io.StringIO()
    print_findings(findings, Console(file=stream, width=100))
    assert "broken [x]" in stream.getvalue() and "apex: pip uninstall apex" in stream.getvalue()

    monkeypatch.setattr(doctor, "examine", lambda: findings)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json"])
    assert stopped.value.code == 1
    assert json.loads(capsys.readouterr().out)[1]["advice"] == "pip uninstall apex"

    monkeypatch.setattr(doctor, "examine", lambda: findings[:1])
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert not stopped.value.code
