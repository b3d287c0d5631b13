"""Whether a server's tensors are the trainer's, one by one, by SGLang's own checksums of them."""

from gtpo_megatron.rollout.sglang.client import Client, ServerFault


async def checksums(client: Client, url: str, timeout_s: float) -> dict[str, str]:
    """Checksum of each tensor of a server, by rank and SGLang's name of it (it fuses q, k, v and gate, up).

    Raises:
        ServerFault, Refused: the server did not answer, or not so.
    """
    answer = await client.call(url, "/weights_checker", {"action": "checksum"}, timeout_s)
    try:
        return {
            f"{name} (rank {i})": c
            for i, rank in enumerate(answer["ranks"])
            for name, c in rank["checksums"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerFault(
            f"{url}/weights_checker answered garbage ({error!r}): {str(answer)[:300]}"
        ) from error


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Names of the tensors whose checksums are not the same, or that only one side has."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


async def differing_tensors(
    client: Client, url: str, directory: str, tag: str, timeout_s: float, control_s: float
) -> list[str]:
    """Names of the tensors that a server held otherwise than the checkpoint in `directory`, which it holds afterwards.

    Raises:
        ServerFault, Refused: the server did not answer, or could not load the checkpoint.
    """
    await client.call(url, "/pause_generation", {"mode": "retract"}, control_s)
    held = await checksums(client, url, timeout_s)
    # Noise first: a tensor that the checkpoint lacks would otherwise keep its value and seem right.
    await client.call(url, "/weights_checker", {"action": "reset_tensors"}, timeout_s)
    body = {"model_path": directory, "weight_version": tag, "flush_cache": True}
    await client.call(url, "/update_weights_from_disk", body, timeout_s)
    loaded = await checksums(client, url, timeout_s)
    await client.call(url, "/continue_generation", {}, control_s)
    return differing(held, loaded)
