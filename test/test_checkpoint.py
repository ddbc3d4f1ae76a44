# SPDX-License-Identifier: Apache-2.0
"""Checkpoints load completely or not at all, with a one-sentence error message."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from vggt_ros.model import VGGT, CheckpointError, VGGTConfig, build_vggt, load_checkpoint

TINY = VGGTConfig.tiny()


@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(1)
    return {key: torch.randn_like(value) for key, value in VGGT(TINY).state_dict().items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VGGT(TINY)


def assert_rejected(model, checkpoint, *parts, chained=False):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, checkpoint)
    message = str(caught.value)
    assert '\n' not in message
    assert all(part in message for part in parts), message
    assert (caught.value.__cause__ is not None) == chained
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', ['w.pt', 'w.safetensors'])
def test_both_file_formats_load_every_parameter(model, weights, tmp_path, name):
    path = tmp_path / name
    save_file(weights, path) if name.endswith('safetensors') else torch.save(weights, path)
    loaded = load_checkpoint(model, str(path))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert loaded.path == path
    assert loaded.tensors == len(weights)
    assert loaded.parameters == sum(value.numel() for value in weights.values())


def test_a_training_checkpoint_is_unwrapped(model, weights, tmp_path):
    torch.save({'model': weights, 'optimizer': {'lr': 1.0}, 'steps': 3}, tmp_path / 'w.pt')
    load_checkpoint(model, tmp_path / 'w.pt')
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_files_of_the_old_torch_format_load(model, weights, tmp_path):
    torch.save(weights, tmp_path / 'w.pt', _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / 'w.pt')
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_converted_to_the_dtype_of_the_parameters(
    model, weights, tmp_path, dtype
):
    halves = {key: value.to(dtype) for key, value in weights.items()}
    save_file(halves, tmp_path / 'w.safetensors')
    load_checkpoint(model, tmp_path / 'w.safetensors')
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, halves[key].float())


def test_a_network_is_built_from_a_checkpoint_without_random_weights(
    weights, tmp_path, monkeypatch
):
    save_file(weights, tmp_path / 'w.safetensors')
    # torch's compiler takes many seconds to import and has no business here
    monkeypatch.setitem(sys.modules, 'torch._dynamo', None)
    model = build_vggt(TINY, tmp_path / 'w.safetensors')
    assert not model.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    mask = model.aggregator.patch_embed.mask_token
    assert [p for p in model.parameters() if not p.requires_grad] == [mask]


def test_a_network_on_the_meta_device_is_rejected(weights, tmp_path):
    save_file(weights, tmp_path / 'w.safetensors')
    with torch.device('meta'):
        model = VGGT(TINY)
    with pytest.raises(ValueError, match='build_vggt'):
        load_checkpoint(model, tmp_path / 'w.safetensors')


def test_missing_unexpected_and_misshapen_keys_are_listed(model, weights, tmp_path):
    wrong = dict(weights)
    for index in range(12):
        wrong[f'extra.{index}'] = torch.zeros(1)
    del wrong['camera_head.empty_pose_tokens']
    wrong['aggregator.camera_token'] = torch.zeros(1, 2, 1, 31)
    save_file(wrong, tmp_path / 'w.safetensors')
    assert_rejected(
        model,
        tmp_path / 'w.safetensors',
        '1 missing (camera_head.empty_pose_tokens)',
        '12 unexpected (extra.0, ',
        'and 2 more',
        '1 misshapen (aggregator.camera_token (1, 2, 1, 31) instead of (1, 2, 1, 32))',
    )


@pytest.mark.parametrize('name', ['w.pt', 'w.safetensors'])
@pytest.mark.parametrize('share', [0.001, 0.5, 0.999])
def test_a_truncated_file_is_rejected(model, weights, tmp_path, name, share):
    path = tmp_path / name
    save_file(weights, path) if name.endswith('safetensors') else torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_rejected(model, path, 'corrupt or not a checkpoint', chained=True)


@pytest.mark.parametrize('name', ['w.pt', 'w.safetensors'])
@pytest.mark.parametrize(
    'content',
    [b'\0' * 5000, b'<html>404</html>', bytes(range(256)) * 40],
    ids=['zeros', 'html', 'noise'],
)
def test_a_file_of_another_format_is_rejected(model, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_rejected(model, tmp_path / name, 'corrupt or not a checkpoint', chained=True)


def test_a_file_with_the_suffix_of_the_other_format_is_rejected(model, weights, tmp_path):
    save_file(weights, tmp_path / 'w.pt')
    torch.save(weights, tmp_path / 'w.safetensors')
    assert_rejected(model, tmp_path / 'w.pt', 'corrupt or not a checkpoint', chained=True)
    assert_rejected(model, tmp_path / 'w.safetensors', 'corrupt or not a checkpoint', chained=True)


def test_code_in_a_file_is_not_executed(model, tmp_path):
    class Payload:
        def __reduce__(self):
            return exec, (f'open({str(tmp_path / "ran")!r}, "w")',)

    torch.save({'model': Payload()}, tmp_path / 'w.pt')
    assert_rejected(model, tmp_path / 'w.pt', 'corrupt or not a checkpoint', chained=True)
    assert not (tmp_path / 'ran').exists()


def test_paths_that_are_not_files_are_rejected(model, tmp_path):
    (tmp_path / 'empty.pt').touch()
    (tmp_path / 'w.onnx').write_bytes(b'x')
    assert_rejected(model, tmp_path / 'empty.pt', 'is empty')
    assert_rejected(model, tmp_path / 'none.safetensors', 'does not exist')
    assert_rejected(model, tmp_path, 'is a directory')
    assert_rejected(model, tmp_path / 'w.onnx', 'neither a file ending in .safetensors')
    assert_rejected(model, 'no such thing', 'neither a file')


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ([1, 2], 'contains a list; expected a dictionary of tensors'),
        (torch.zeros(3), 'contains a Tensor; expected'),
        ({'a': torch.zeros(1), 'b': 'text'}, 'entries that are not named tensors: b'),
        ({3: torch.zeros(1)}, 'entries that are not named tensors: 3'),
    ],
)
def test_content_other_than_named_tensors_is_rejected(model, tmp_path, content, expected):
    torch.save(content, tmp_path / 'w.pt')
    assert_rejected(model, tmp_path / 'w.pt', expected)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_rejected(model, weights, tmp_path, value):
    not_finite = {key: tensor.clone() for key, tensor in weights.items()}
    not_finite['depth_head.norm.bias'][3] = value
    save_file(not_finite, tmp_path / 'w.safetensors')
    assert_rejected(model, tmp_path / 'w.safetensors', 'NaN or infinity in depth_head.norm.bias')


def test_integer_weights_are_rejected(model, weights, tmp_path):
    wrong = {**weights, 'depth_head.norm.bias': torch.zeros(64, dtype=torch.int32)}
    save_file(wrong, tmp_path / 'w.safetensors')
    assert_rejected(model, tmp_path / 'w.safetensors', 'depth_head.norm.bias torch.int32')


def test_an_unreachable_hub_gives_one_sentence(model, monkeypatch):
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert_rejected(
        model, 'nobody/no-such-model', 'could not be downloaded from the hub', chained=True
    )


def test_a_missing_hub_client_gives_one_sentence(model, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert_rejected(
        model, 'facebook/VGGT-1B', 'needs huggingface_hub, which is not installed', chained=True
    )
