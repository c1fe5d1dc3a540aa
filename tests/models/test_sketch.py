"""Sizes by arithmetic equal those of the real classes; published models have their published sizes."""

from pathlib import Path

import pytest

from slm_exp.models.sizes import PUBLISHED, SMOLLM2, sizes_of
from slm_exp.models.tiny import Tiny


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_real_classes(family, tied, make_tiny):
    real = make_tiny(family, tied=tied, layers=3)
    sketch = Tiny(family=family, tied=tied, layers=3).sketch(Path("unused"), "cpu")
    assert sketch.digest == real.digest
    assert (sketch.sizes.total, sketch.sizes.layer) == (real.n_params, real.layer_params)
    assert sketch.handle.sublayer_params == real.sublayer_params
    assert sketch.handle.sizes == real.sizes == sketch.sizes
    products = real.layout.work(real.layers[0], real.config)
    attention = 4 * real.layout.attention_width(real.layers[0]) * 65 / 2
    head = real.model.get_output_embeddings().weight.numel()
    assert sketch.sizes.flops_per_token(64) == 2 * head + 3 * (2 * products + attention)
    assert sketch.sizes.with_layers(2).total == real.n_params - real.layer_params
    assert sizes_of(real.config.to_dict()) == sketch.sizes


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (SMOLLM2, 134_515_008),
        (PUBLISHED["meta-llama/Llama-2-7b-hf"], 6_738_415_616),
        (PUBLISHED["meta-llama/Llama-2-13b-hf"], 13_015_864_320),
        (PUBLISHED["meta-llama/Meta-Llama-3-8B"], 8_030_261_248),
        (PUBLISHED["lmsys/vicuna-7b-v1.3"], 6_738_415_616),
    ],
)
def test_published_sizes(config, params):
    assert sizes_of(config).total == params


def test_six_of_32_layers_are_18_percent_of_llama():
    dense = sizes_of(PUBLISHED["meta-llama/Llama-2-7b-hf"])
    assert 1 - dense.with_layers(26).total / dense.total == pytest.approx(0.180, abs=5e-4)


def test_every_hub_preset_has_its_sizes():
    conf = Path(__file__).resolve().parents[2] / "conf" / "model"
    paths = [line.split()[1] for p in conf.glob("*.yaml") for line in p.read_text().splitlines() if line[:5] == "path:"]
    assert paths
    assert set(paths) <= set(PUBLISHED)
