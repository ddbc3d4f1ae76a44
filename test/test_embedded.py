# SPDX-License-Identifier: Apache-2.0
"""The network included in the package: written, checked, loaded."""

import json
import re

import cv2
import pytest
import torch

from vggt_ros.cli.train import EmbedWeights, PlotTraining
from vggt_ros.inference.load import load_network
from vggt_ros.lab.evaluation.synthetic_windows import evaluate_windows
from vggt_ros.lab.training.dataset import SyntheticDataset
from vggt_ros.model import VGGT, VGGTConfig, embedded
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.model.embedded import find_embedded, write_embedded
from vggt_ros.settings import ModelSettings


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return VGGT(VGGTConfig.tiny()).eval()


@pytest.fixture
def folder(tiny, tmp_path):
    write_embedded(tiny, 84, 'nothing at all', 'none', tmp_path / 'weights')
    return tmp_path / 'weights'


def test_written_weights_predict_as_the_model(tiny, folder):
    path, about = find_embedded(folder)
    assert about.image_width == 84 and about.licence == 'Apache-2.0'
    assert about.trained_on == 'nothing at all'
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in tiny.parameters())  # float16
    network = load_network(ModelSettings(checkpoint=str(path), device='cpu'))
    images = torch.rand(1, 2, 3, 56, 84)
    with torch.no_grad():
        expected = tiny(images, heads=('camera',)).pose_encodings[-1]
    found = network.predict(images, ('camera',)).pose_encodings[-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_the_embedded_network_is_described_by_its_folder(caplog):
    caplog.set_level('INFO')
    network = load_network(ModelSettings(checkpoint='embedded', device='cpu'))
    _, about = find_embedded()
    assert network.image_width == about.image_width and network.trained
    assert about.trained_on in network.name and network.name in caplog.text


def test_corruption_is_detected(folder):
    path = folder / embedded.WEIGHTS
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r'has the SHA-256 \w+, expected \w+'):
        find_embedded(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match='cannot be read'):
        find_embedded(folder)


def test_an_invalid_description_is_rejected(folder):
    (folder / embedded.ABOUT).write_text(json.dumps({'colour': 'red'}))
    with pytest.raises(CheckpointError, match='cannot be read'):
        find_embedded(folder)


def test_weights_outside_the_range_of_float16_are_rejected(tiny, tmp_path):
    with torch.no_grad():
        tiny.camera_head.trunk_norm.weight[0] = 1e6
    with pytest.raises(ValueError, match=r'trunk_norm.*outside the range of float16'):
        write_embedded(tiny, 84, '', '', tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_too_large_are_rejected(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, 'MAX_BYTES', 1000)
    with pytest.raises(ValueError, match='at most 1000'):
        write_embedded(tiny, 84, '', '', tmp_path)


def test_the_weights_of_the_package_are_trained():
    """Untrained weights have the error of a constant depth; a moderate bound detects training."""
    path, about = find_embedded()
    assert path.stat().st_size < embedded.MAX_BYTES
    network = load_network(ModelSettings(checkpoint='embedded', device='cpu'))
    source = SyntheticDataset('test', 11, 56, about.image_width, queries=4)
    found = evaluate_windows(network, source, windows=12, frames=4, training_windows=20)
    ours, constant = found['model'], found['baselines']['constant_depth']
    assert ours['absrel'] < 0.7 * constant['absrel']
    assert ours['rotation_median_deg'] < found['baselines']['mean_motion']['rotation_median_deg']


def test_the_command_converts_a_checkpoint(tiny, tmp_path, capsys):
    torch.save({'model': tiny.state_dict()}, tmp_path / 'best.pt')
    (tmp_path / 'config.json').write_text(json.dumps(tiny.config.to_dict()))
    folder = tmp_path / 'made'
    arguments = ['--image-width', '56', '--training', 'none', '--folder', str(folder)]
    assert EmbedWeights.main([str(tmp_path / 'best.pt'), *arguments]) == 0
    path, about = find_embedded(folder)
    assert (about.image_width, about.training) == (56, 'none') and path.parent == folder
    assert about.sha256 in capsys.readouterr().out
    assert EmbedWeights.main([str(tmp_path / 'other.pt'), *arguments]) == 2
    assert re.search(r'^embed-weights: .*other\.pt', capsys.readouterr().err)


def test_the_command_draws_a_curve(tmp_path):
    rows = ['windows,train_flow,validation_flow', '1000,0.5,0.6', '2000,0.4,']
    (tmp_path / 'curve.csv').write_text('\n'.join(rows))
    output = tmp_path / 'curve.png'
    assert PlotTraining.main([str(tmp_path / 'curve.csv'), '--output', str(output)]) == 0
    plot = cv2.imread(str(output))
    assert plot.shape == (560, 1200, 3) and (plot < 100).any()
