"""Seconds of a step and of sampling: against published operation counts, and each rule by what it changes."""

import re
from dataclasses import replace

import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.facts import efficiency, find_gpu, find_model, gpu_names
from gtpo_megatron.plan.flop import model_flop
from gtpo_megatron.plan.sampling import Server, decode_seconds, sampling_seconds, served_tokens_per_second
from gtpo_megatron.plan.time import Layout, Work, step_time, transfer_seconds
from tests.plan.test_published import rows

H100, REACHED = find_gpu("h100-sxm"), efficiency()
LLAMA, MIXTURE = find_model("Llama-3.1-8B"), find_model("Qwen3-30B-A3B")
WORK = Work(row=4096, rows=1, micro_batches=8)


def test_model_flop_is_what_megatron_bridge_counts() -> None:
    """Its tables give TFLOP/s and tokens/s of the same run; the quotient is the count.

    Not of GPT-OSS: there it is that of experts without gates and of layers without windows, 17% below the model's.
    """
    found = 0
    for row in rows():
        match = re.search(r"model TFLOP/s/GPU (\d+)", row["extra"])
        if match and find_model(row["model"]).sliding is None:
            published = float(match[1]) * 1e12 / float(row["result"])
            counted = model_flop(find_model(row["model"]), int(row["seq_len"]))
            assert counted == pytest.approx(published, rel=0.01), row["id"]
            found += 1
    assert found == 4


def test_the_bubble_is_of_the_stages_and_chunks() -> None:
    for virtual in (1, 2, 4):
        time = step_time(LLAMA, H100, Layout(gpus=4, pipeline=4, virtual=virtual), WORK, REACHED)
        busy = time.total - time.bubble - time.data - time.optimizer
        assert time.bubble == pytest.approx(busy * 3 / (virtual * 8))


def test_scoring_is_a_third_of_the_operations() -> None:
    train = step_time(LLAMA, H100, Layout(1), WORK, REACHED)
    score = step_time(LLAMA, H100, Layout(1), replace(WORK, forward_only=True), REACHED)
    assert score.matmul == pytest.approx(train.matmul / 3)
    assert score.attention == pytest.approx(train.attention / 3)
    assert score.data == score.optimizer == 0


def test_full_recomputation_is_another_forward_pass_of_the_layers() -> None:
    none = step_time(LLAMA, H100, Layout(1), WORK, REACHED)
    full = step_time(LLAMA, H100, Layout(1), replace(WORK, recompute="full"), REACHED)
    head = LLAMA.head_parameters / (LLAMA.dense_parameters + LLAMA.head_parameters)
    assert full.matmul / none.matmul == pytest.approx(1 + (1 - head) / 3)
    assert full.attention / none.attention == pytest.approx(4 / 3)


def test_tensor_parallelism_beyond_a_node_pays_for_the_network() -> None:
    wide = replace(H100, node=4)
    near, far = (step_time(LLAMA, gpu, Layout(8, tensor=8), WORK, REACHED).tensor for gpu in (H100, wide))
    assert step_time(LLAMA, H100, Layout(1), WORK, REACHED).tensor == 0
    assert far > 1.5 * near > 0


def test_experts_cross_nodes_at_the_speed_of_a_card() -> None:
    def seconds(expert: int, once: bool = False) -> float:
        layout = Layout(64, expert=expert, once_per_node=once)
        return step_time(MIXTURE, H100, layout, WORK, REACHED).expert

    assert seconds(1) == 0
    assert seconds(64) > 4 * seconds(8) > 0
    assert seconds(8) < seconds(64, once=True) < seconds(64)


def test_weights_are_sent_by_all_stages_at_once() -> None:
    assert transfer_seconds(LLAMA, H100, REACHED) == pytest.approx(
        4 * transfer_seconds(LLAMA, H100, REACHED, senders=4)
    )


def test_a_machine_without_fp8_is_no_faster_for_it() -> None:
    a100 = find_gpu("a100")
    assert gpu_names()[0] == "h100-sxm" and a100.fp8 is None
    fp8 = replace(WORK, precision="fp8")
    assert step_time(LLAMA, a100, Layout(1), fp8, REACHED) == step_time(LLAMA, a100, Layout(1), WORK, REACHED)
    assert (
        step_time(LLAMA, H100, Layout(1), fp8, REACHED).matmul
        < step_time(LLAMA, H100, Layout(1), WORK, REACHED).matmul
    )


def test_few_sequences_touch_few_experts() -> None:
    server = Server(MIXTURE, H100, 2)
    assert decode_seconds(server, 1, 500, REACHED) < 0.7 * decode_seconds(server, 64, 500, REACHED)


def test_a_batch_takes_as_long_as_its_longest() -> None:
    server = Server(LLAMA, H100, 1)
    even = sampling_seconds(server, 100, [500] * 32, 32, REACHED)
    tail = sampling_seconds(server, 100, [400] * 31 + [3600], 32, REACHED)
    assert tail > 4 * even


def test_what_does_not_fit_at_once_waits() -> None:
    server = Server(LLAMA, H100, 1)
    together = sampling_seconds(server, 100, [500] * 32, 32, REACHED)
    in_turns = sampling_seconds(server, 100, [500] * 32, 8, REACHED)
    assert 2 * together < in_turns < 4.5 * together
    small = replace(server, memory_share=(server.weights + 8 * 600 * server.token_cache) / H100.memory)
    assert sampling_seconds(small, 100, [500] * 32, 32, REACHED) == pytest.approx(in_turns, rel=0.01)


def test_more_requests_give_more_tokens_until_the_cache_is_full() -> None:
    server = Server(LLAMA, H100, 1)
    rates = [served_tokens_per_second(server, 1024, 256, n, REACHED) for n in (1, 8, 64, 100_000, 200_000)]
    assert rates[0] < rates[1] < rates[2] < rates[3] == rates[4]


def test_a_server_too_small_for_the_longest_names_the_key() -> None:
    with pytest.raises(UserError, match="raise rollout.sglang.tensor"):
        sampling_seconds(Server(find_model("Llama-3.1-70B"), H100, 1), 100, [500], 1, REACHED)
