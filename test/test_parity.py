# SPDX-License-Identifier: Apache-2.0
"""
The network equals the reference: on two small cases, and on all others where available.

Golden outputs come from the reference in float32 with weights seeded by the key names, so no
weights are stored. `shared/vggt` beside the repository holds more cases, with intermediates.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vggt_ros.lab.parity.golden_cases import (
    build_case,
    check_case,
    named_outputs,
    relative_deviation,
    run_model,
)
from vggt_ros.lab.parity.weight_recipe import uniform_from_name, weight_from_name
from vggt_ros.model import VGGT, VGGTConfig, cast_linear_weights
from vggt_ros.model.attention import patch_positions, rope_table

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / 'shared' / 'vggt'
OWN_CASES = sorted((HERE / 'golden').glob('pub*'))
SHARED_CASES = sorted((SHARED / 'golden_public').glob('pub*'))
needs_shared = pytest.mark.skipif(not SHARED_CASES, reason='no ../shared/vggt with golden cases')


def exceeding(deviations):
    return [f'{d.name} {d.error:.1e} > {d.limit:.0e}' for d in deviations if not d.passed]


@pytest.mark.parametrize('folder', OWN_CASES, ids=lambda folder: folder.name)
def test_outputs_equal_the_reference(folder):
    deviations = check_case(folder)
    assert len(deviations) == 24
    assert exceeding(deviations) == []


@needs_shared
@pytest.mark.parametrize('folder', SHARED_CASES, ids=lambda folder: folder.name)
def test_every_intermediate_equals_the_reference(folder):
    deviations = check_case(folder)
    assert len(deviations) > 80
    assert exceeding(deviations) == []


def test_a_wrong_norm_epsilon_is_detected():
    folder = HERE / 'golden' / 'pubE'
    model = build_case(folder)
    model.aggregator.patch_embed.norm.eps = 1e-5
    inputs = load_file(folder / 'inputs.safetensors')
    ours = run_model(model, inputs['images'], inputs['query_points'])
    golden = load_file(folder / 'outputs.safetensors')
    name = 'dino.patch_tokens'
    assert relative_deviation(golden[name], ours[name]) > 5e-5


def test_deviation_is_infinite_for_other_shapes_and_for_values_that_are_not_finite():
    golden = torch.tensor([1.0, 2.0, float('inf')])
    assert relative_deviation(golden, golden) == 0
    assert relative_deviation(golden, torch.tensor([1.0, 2.1, float('inf')])) == pytest.approx(0.2)
    assert relative_deviation(golden, golden[:2]) == float('inf')
    assert relative_deviation(golden, torch.tensor([1.0, float('nan'), float('inf')])) == float(
        'inf'
    )


def test_full_size_has_the_keys_and_shapes_of_the_released_checkpoint():
    with torch.device('meta'):
        model = VGGT(VGGTConfig.vggt_1b())
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    manifest = SHARED / 'manifest_vggt_1b.json'
    if manifest.exists():
        tensors = json.loads(manifest.read_text())['tensors']
        assert shapes == {key: value['shape'] for key, value in tensors.items()}
    assert len(shapes) == 1797
    assert sum(p.numel() for p in model.parameters()) == 1_256_537_516
    lines = '\n'.join(f'{key} {tuple(shape)}' for key, shape in sorted(shapes.items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == 'e9afc54aaa0fa1234409f27a90673297f5ad3d9014ea61d5e30a7d4e623de167'


def test_recipe_weights_are_the_same_on_every_machine():
    assert uniform_from_name('images', (2, 2), 'x').tolist() == [
        [0.16199523210525513, 0.5587193369865417],
        [0.338742733001709, 0.08839666843414307],
    ]
    assert weight_from_name('a.gamma', (2,), 's').dtype == 'float32'


@needs_shared
def test_recipe_weights_equal_the_stored_ones():
    case = SHARED / 'golden_public' / 'pubA'
    stored = load_file(case / 'weights.safetensors')
    computed = build_case(case).state_dict()
    assert stored.keys() == computed.keys()
    assert all(torch.equal(stored[key], computed[key]) for key in stored)


@needs_shared
def test_rope_table_equals_the_reference_without_autocast():
    golden = load_file(SHARED / 'golden_public' / 'rope_tables_dim32_len38.safetensors')
    positions = torch.arange(38)[:, None].expand(-1, 2)
    cos, sin = rope_table(positions, head_dim=64, base=100)
    for axis in range(2):
        assert relative_deviation(golden['cos_fp32'], cos[:, axis].repeat(1, 2)) < 1e-6
        assert relative_deviation(golden['sin_fp32'], sin[:, axis].repeat(1, 2)) < 1e-6


def test_patch_positions_start_at_one_and_special_tokens_are_at_the_origin():
    positions = patch_positions(2, 3, 5, torch.device('cpu'))
    assert positions[:5].abs().sum() == 0
    assert positions[5:].tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]


@needs_shared
@pytest.mark.parametrize('case', ['pubA', 'pubC'])
def test_bfloat16_weights_equal_the_reference_under_autocast_within_3_percent(case):
    folder = SHARED / 'golden_public' / case
    model = build_case(folder)
    cast_linear_weights(model, torch.bfloat16)
    inputs = load_file(folder / 'inputs.safetensors')
    with torch.no_grad():
        prediction = model(inputs['images'], inputs['query_points'])
    image_size = inputs['images'].shape[-2:]
    ours = named_outputs(prediction, (image_size[0], image_size[1]))
    emulated = load_file(folder / 'outputs_emulated_bf16_autocast.safetensors')
    exact = load_file(folder / 'outputs.safetensors')
    for name in ('pose_enc', 'depth', 'depth_conf', 'world_points', 'world_points_conf'):
        centred = exact[name] - exact[name].mean()
        error = (ours[name] - emulated[name]).norm() / centred.norm()
        assert error < 0.03, name
        assert not torch.equal(ours[name], exact[name]), name
