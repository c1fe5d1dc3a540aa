"""Run as a script in a fresh process: does a checkpoint reload, with transformers alone, as the model that was saved?

    python -P reload.py EXPECTED_DIR

EXPECTED_DIR holds expected.json and logits.npy (see `checkpoint.expectation`); result.json is written there:
`{"error": null or text, ...measured}`. This file imports nothing of the package, so that a checkpoint cannot come to
depend on it.
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


def tensor_digests(model: Any) -> dict[str, str]:
    """Every entry of the state dict, tied ones too: sha256 over dtype, shape and bytes."""
    import torch

    out = {}
    for name, tensor in model.state_dict().items():
        found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        out[name] = found.hexdigest()[:16]
    return out


def check(expected: Json, logits_NTV: Any) -> Json:
    """Compare; returns what was measured, with the first difference under `error`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, device = expected["folder"], expected["device"]
    torch.set_num_threads(expected["threads"])
    torch.set_deterministic_debug_mode("error" if expected["deterministic"] else "default")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=expected["own_code"],
        output_loading_info=True, device_map="auto" if device == "auto" else None)
    model, info = loaded
    if device != "auto":
        model.to(device)
    model.eval()
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            return {"error": f"{what}: {', '.join(sorted(map(str, info[what]))[:3])}"}

    found = tensor_digests(model)
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
    prompt = max(1, tokens_NT.shape[1] - NEW_TOKENS)
    with torch.inference_mode():
        for some_NT in (tokens_NT[:, :prompt], *tokens_NT[:, prompt:].split(1, dim=1)):  # as generation feeds them
            out = model(some_NT, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cached_NTV.append(out.logits.float().cpu())
    off = float((torch.cat(cached_NTV, dim=1) - whole_NTV).abs().max())
    result["kv_cache_off"] = off
    if not off <= expected["kv_tolerance"]:
        return {**result, "error": f"logits with the KV cache differ by {off:.3g}"}
    texts = [model.generate(tokens_NT[:1], attention_mask=torch.ones_like(tokens_NT[:1]), do_sample=False, num_beams=1,
                            max_new_tokens=NEW_TOKENS, use_cache=cached, pad_token_id=0) for cached in (True, False)]
    if expected["exact"] and not torch.equal(*texts):
        return {**result, "error": "generated text with and without the KV cache differs"}
    if "slm_exp" in sys.modules:
        return {**result, "error": "loading the checkpoint imported slm_exp"}
    return result


def main(where: str) -> None:
    """Read what is expected, compare, write result.json."""
    import numpy as np

    at = Path(where)
    expected = json.loads((at / "expected.json").read_text(encoding="utf-8"))
    try:
        result = check(expected, np.load(at / "logits.npy", allow_pickle=False))
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    (at / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
