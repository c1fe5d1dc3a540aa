"""Run as a script in a fresh process: does a checkpoint reload, with transformers alone, as the model that was saved?

    python -P reload.py EXPECTED_DIR

It imports, waits for a line (none: whoever started it is gone), and reads expected.json and logits.npy in EXPECTED_DIR
(see `checkpoint.expectation`); result.json is written there: `{"error": null or text, ...measured}`. This file imports
nothing of the package, so that a checkpoint cannot come to depend on it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 4

Json = dict[str, Any]
"""Contents of expected.json and result.json."""


def tensor_digest(tensor: Any) -> str:
    """Of dtype, shape and bytes."""
    import torch

    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def tensor_digests(model: Any) -> dict[str, str]:
    """Every entry of the state dict, tied ones too."""
    return {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}


def file_digests(folder: str) -> dict[str, str]:
    """Every tensor of the weight files under its name there, one in memory at a time."""
    from safetensors import safe_open

    out = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as names:
            found = list(names.keys())
        for name in found:
            with safe_open(path, "pt") as file:  # opened anew: pages of one map would stay in memory
                out[name] = tensor_digest(file.get_tensor(name))
    return out


def check(expected: Json, logits_NTV: Any) -> Json:
    """Compare; returns what was measured, with the first difference under `error`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, device, placed = expected["folder"], expected["device"], expected["placed"]
    torch.set_num_threads(expected["threads"])
    torch.set_deterministic_debug_mode("error" if expected["deterministic"] else "default")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=expected["own_code"],
        output_loading_info=True, device_map=placed or ("auto" if device == "auto" else None),
        offload_folder=expected["scratch"] if placed else None)
    model, info = loaded
    if device != "auto" and not placed:
        model.to(device)
    model.eval()
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            return {"error": f"{what}: {', '.join(sorted(map(str, info[what]))[:3])}"}

    found = file_digests(folder) if placed else tensor_digests(model)
    for name in sorted(set(found) | set(expected["tensors"])):
        if found.get(name) != expected["tensors"].get(name):
            return {"error": f"tensor {name} differs from the one saved"}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if (embedding.data_ptr() == head.data_ptr()) != expected["tied"]:
        return {"error": f"input and output embeddings should {'' if expected['tied'] else 'not '}be one tensor"}
    if expected["tokenizer"]:
        AutoTokenizer.from_pretrained(folder, local_files_only=True)

    tokens_NT = torch.tensor(expected["tokens"], device=embedding.device)
    with torch.inference_mode():
        whole_NTV = model(tokens_NT, use_cache=False).logits.float().cpu()
    off = float((whole_NTV - torch.from_numpy(logits_NTV)).abs().max())
    result: Json = {"error": None, "tensors": len(found), "logits_off": off}
    if not off <= expected["tolerance"]:
        return {**result, "error": f"logits differ by {off:.3g}"}

    cached_NTV, cache = [], None
    prompt = max(1, tokens_NT.shape[1] - (1 if placed else NEW_TOKENS))
    with torch.inference_mode():
        for some_NT in (tokens_NT[:, :prompt], *tokens_NT[:, prompt:].split(1, dim=1)):  # as generation feeds them
            out = model(some_NT, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cached_NTV.append(out.logits.float().cpu())
    off = float((torch.cat(cached_NTV, dim=1) - whole_NTV).abs().max())
    result["kv_cache_off"] = off
    if not off <= expected["kv_tolerance"]:
        return {**result, "error": f"logits with the KV cache differ by {off:.3g}"}
    if "slm_exp" in sys.modules:
        return {**result, "error": "loading the checkpoint imported slm_exp"}
    if placed:  # every token would read all layers again
        return result
    texts = [model.generate(tokens_NT[:1], attention_mask=torch.ones_like(tokens_NT[:1]), do_sample=False, num_beams=1,
                            max_new_tokens=NEW_TOKENS, use_cache=cached, pad_token_id=0) for cached in (True, False)]
    if expected["exact"] and not torch.equal(*texts):
        return {**result, "error": "generated text with and without the KV cache differs"}
    return result


def peak_bytes() -> int | None:
    """The most memory this process has had, mapped files included; None where the system does not say. Not getrusage's:
    that one starts with the peak of the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def main(where: str) -> None:
    """Read what is expected, compare, write result.json."""
    import numpy as np

    at = Path(where)
    expected = json.loads((at / "expected.json").read_text(encoding="utf-8"))
    try:
        result = check(expected, np.load(at / "logits.npy", allow_pickle=False))
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    result["peak_bytes"] = peak_bytes()
    (at / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    import torch  # noqa: F401  # now, while the checkpoint is still being written
    from transformers import AutoModelForCausalLM  # noqa: F401

    if sys.stdin.readline():
        main(sys.argv[1])
