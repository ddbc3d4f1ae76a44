# SPDX-License-Identifier: Apache-2.0
"""Training the smallest network: it learns, resumes to the bit, and runs in several processes."""

import csv
import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from vggt_ros.lab.training.dataset import SyntheticDataset
from vggt_ros.lab.training.loop import train
from vggt_ros.lab.training.losses import DenseLoss, LossSettings, TrackLoss
from vggt_ros.lab.training.matching import (
    MatchingLoss,
    matching_loss,
    matching_targets,
    record_attention,
)
from vggt_ros.lab.training.recipes import PARTS, RECIPES, TrainSettings
from vggt_ros.lab.training.start import initialise_weights
from vggt_ros.lab.training.trainer import Trainer
from vggt_ros.model import VGGT, VGGTConfig, load_checkpoint

HEIGHT, WIDTH = 28, 42
DATASET = SyntheticDataset('train', 0, HEIGHT, WIDTH, queries=4)
MATCHING = MatchingLoss(blocks=(1,))
SETTINGS = TrainSettings(
    windows=16, batch=4, frames=(2, 3), validate_every=8, validation_windows=4, matching=MATCHING
)


def new_model():
    torch.manual_seed(0)
    model = VGGT(VGGTConfig.tiny())
    initialise_weights(model, 0)
    return model


def weights_of(trainer):
    return {
        **{f'model.{name}': value for name, value in trainer.model.state_dict().items()},
        **{f'average.{name}': value for name, value in trainer.average.state_dict().items()},
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong


class OneBatch:
    """A dataset that always returns the same windows."""

    def __init__(self, count, frames):
        self.windows = DATASET.batch(0, count, frames)

    def batch(self, first, count, frames):  # noqa: ARG002 - the protocol of a dataset
        return self.windows


def test_it_overfits_a_few_windows():
    windows, steps = 8, 300
    dataset = OneBatch(windows, 2)
    settings = TrainSettings(
        windows=windows * steps,
        batch=windows,
        frames=(2,),
        learning_rate=2e-3,
        weight_decay=0.0,
        ema=0.99,
        precision='float32',
        losses=LossSettings(depth=DenseLoss(quantile=0.0)),
        matching=MATCHING,
        validation_windows=windows,
    )
    trainer = Trainer(new_model(), dataset, settings)
    first = trainer.step()
    for _ in range(steps - 1):
        trainer.step()
    last = trainer.validate(dataset)
    ratio = {name: last[name] / first[name] for name in ('camera', 'depth_error', 'matching')}
    # Matching cannot vanish: a point between patches matches several.
    assert ratio['camera'] < 0.1 and ratio['depth_error'] < 0.2 and ratio['matching'] < 0.3, ratio
    assert last['matching_first'] > 0.9


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    validation = replace(DATASET, split='validation')
    whole = Trainer(new_model(), DATASET, SETTINGS)
    train(whole, validation, tmp_path / 'whole')
    train(Trainer(new_model(), DATASET, SETTINGS), validation, tmp_path / 'parts', until=8)
    torch.manual_seed(5)  # the initial weights of the second half must not matter
    second = Trainer(VGGT(VGGTConfig.tiny()), DATASET, SETTINGS)
    train(second, validation, tmp_path / 'parts')
    assert second.windows_seen == whole.windows_seen == 16
    assert_same(weights_of(second), weights_of(whole))
    rows = [list(csv.DictReader((tmp_path / n / 'curve.csv').open())) for n in ('whole', 'parts')]
    assert [row['windows'] for row in rows[0]] == ['8', '16']
    for one, other in zip(*rows):
        one.pop('seconds'), other.pop('seconds')
        assert one == other
    loaded = VGGT(VGGTConfig.tiny())
    load_checkpoint(loaded, tmp_path / 'whole' / 'best.pt')


def test_a_state_of_an_earlier_version_is_one_clear_error():
    trainer = Trainer(new_model(), DATASET, SETTINGS)
    before = {name: value.clone() for name, value in weights_of(trainer).items()}
    state = Trainer(VGGT(VGGTConfig.tiny()), DATASET, SETTINGS).state()
    state['reader'] = state.pop('flow_probe')
    with pytest.raises(ValueError, match='no flow_probe: it is of an earlier version'):
        trainer.restore(state)
    assert_same(weights_of(trainer), before)


def test_accumulated_parts_equal_the_whole_batch():
    settings = replace(SETTINGS, precision='float32', matching=None)
    whole = Trainer(new_model(), DATASET, settings)
    parts = Trainer(new_model(), DATASET, replace(settings, accumulate=2))
    a, b = whole.step(), parts.step()
    # Each part is a mean over its own valid pixels, equally many in each.
    assert b['camera'] == pytest.approx(a['camera'], rel=1e-4)
    assert b['depth_error'] == pytest.approx(a['depth_error'], rel=0.05)


def test_recomputed_blocks_give_the_same_gradients():
    settings = replace(SETTINGS, precision='float32')
    plain = Trainer(new_model(), DATASET, settings)
    saving = Trainer(new_model(), DATASET, replace(settings, recompute=True))
    for trainer in (plain, saving):
        trainer.step()
    for (name, one), other in zip(plain.model.named_parameters(), saving.model.parameters()):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=name, atol=1e-6, rtol=1e-4)


def test_the_head_schedule_alternates_heads():
    schedule = (('camera',), ('camera', 'depth'))
    trainer = Trainer(new_model(), DATASET, replace(SETTINGS, head_schedule=schedule, frames=(2,)))
    before = [parameter.clone() for parameter in trainer.parts['depth_head']]
    losses = trainer.step()
    assert 'gradient_camera_head' in losses and 'gradient_depth_head' not in losses
    for parameter, old in zip(trainer.parts['depth_head'], before):
        assert torch.equal(parameter, old)
    assert trainer.step()['gradient_depth_head'] > 0


def test_dense_heads_decode_some_frames():
    trainer = Trainer(new_model(), DATASET, replace(SETTINGS, precision='float32', dense_frames=1))
    batch = DATASET.batch(0, 2, 3)
    heads = ('camera', 'depth')
    whole = trainer.losses(batch, heads)
    one_by_one = [trainer.losses(batch, heads, first) for first in range(3)]
    assert {part['camera'].item() for part in one_by_one} == {whole['camera'].item()}
    shapes = torch.stack([part['depth_shape'] for part in one_by_one])
    assert len(set(shapes.tolist())) == 3
    torch.testing.assert_close(shapes.mean(), whole['depth_shape'])


def test_frozen_parts_are_not_trained():
    settings = replace(SETTINGS, frozen=('aggregator',), matching=None)
    trainer = Trainer(new_model(), DATASET, settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.step()
    trained = {
        name.split('.')[0]
        for name, value in trainer.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert trained == {'camera_head', 'depth_head'}  # the other heads have no loss here


def test_every_part_is_trained_when_every_head_has_a_loss():
    losses = LossSettings(points=DenseLoss(shape='normal'), tracks=TrackLoss())
    config = VGGTConfig.tiny()
    trainer = Trainer(new_model(), DATASET, replace(SETTINGS, losses=losses))
    step_losses = trainer.step()
    assert {name for name in step_losses if name.startswith('gradient_')} == {
        f'gradient_{part}' for part in (*PARTS, 'flow_probe')
    }
    unused = {
        name
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
    assert not unused, config


def test_a_gradient_of_nan_stops_the_run_before_the_weights_change():
    trainer = Trainer(new_model(), DATASET, SETTINGS)
    trainer.step()
    before = {name: value.clone() for name, value in weights_of(trainer).items()}
    trainer.parts['depth_head'][0].register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError, match='gradient_depth_head'):
        trainer.step()
    assert_same(weights_of(trainer), before)


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'windows': 0}, 'windows is 0'),
        ({'batch': 5, 'accumulate': 2}, 'multiple of accumulate'),
        ({'frames': ()}, 'frames is'),
        ({'head_schedule': (('points',),)}, 'head_schedule has'),
        ({'dense_frames': -1}, 'dense_frames is -1'),
        ({'frozen': ('brain',)}, 'brain'),
        ({'precision': 'float8'}, 'float8'),
    ],
)
def test_invalid_settings_are_rejected(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**wrong)


def test_a_run_that_cannot_start_is_rejected():
    with pytest.raises(ValueError, match='matching needs blocks'):
        Trainer(new_model(), DATASET, replace(SETTINGS, matching=MatchingLoss(blocks=(7,))))
    with pytest.raises(ValueError, match='nothing to train'):
        Trainer(new_model(), DATASET, replace(SETTINGS, frozen=PARTS))


def test_the_learning_rate_warms_up_and_decays():
    settings = TrainSettings(windows=1000, warm_up=0.1, learning_rate=2.0)
    rates = [settings.learning_rate_at(seen) for seen in (0, 50, 100, 550, 1000)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0], abs=3e-4)


@pytest.mark.parametrize('name', sorted(RECIPES))
def test_recipes_fit_the_small_network(name):
    if RECIPES[name].matching is not None:
        RECIPES[name].matching.validate(VGGT(VGGTConfig.small()))


# --- matching


def test_matching_targets_are_on_the_same_surface():
    truth = SyntheticDataset('train', 1, 84, 112).batch(0, 4, 3).truth
    targets = matching_targets(truth, (6, 8))
    assert targets.shape == (4, 3, 48, 3, 48)
    sums = targets.sum(-1)
    assert ((sums - 1).abs() < 1e-4).logical_or(sums == 0).all()
    assert (sums[:, range(3), :, range(3)] == 0).all()
    assert 0.3 < float((sums > 0).float().sum() / (4 * 3 * 48 * 2)) < 1
    # The weighted mean of the target patches is near the point of the query patch.
    centres = truth.points[:, :, 7::14, 7::14].flatten(2, 3)
    found = torch.einsum('bipjq,bjqc->bipjc', targets, centres)
    gap = (found - centres[:, :, :, None]).norm(dim=-1)
    assert gap[sums > 0].median() < 0.08  # the unit is the mean distance; a patch is 0.15


def test_stationary_cameras_match_every_patch_with_itself():
    truth = DATASET.batch(0, 1, 2).truth
    truth = replace(
        truth,
        camera_from_world=truth.camera_from_world[:, :1].expand(-1, 2, -1, -1),
        depth=truth.depth[:, :1].expand(-1, 2, -1, -1),
        points=truth.points[:, :1].expand(-1, 2, -1, -1, -1),
    )
    targets = matching_targets(truth, (2, 3))[0, 0, :, 1]
    # The point is half a pixel off the centre of the patch.
    assert (targets.diagonal() > 0.9).all()


def test_matching_loss_is_low_for_correct_attention():
    truth = DATASET.batch(0, 2, 3).truth
    targets = matching_targets(truth, (2, 3))
    special, patches, frames = 1, 6, 3
    settings = MatchingLoss(blocks=(0,), first_frame_head=0, any_frame_head=1)
    tokens = frames * (special + patches)
    keys = torch.eye(tokens).expand(2, 2, tokens, tokens)
    every = targets / targets.sum((3, 4), keepdim=True).clamp(min=1e-6)
    ideal = torch.zeros(2, 2, frames, special + patches, frames, special + patches)
    ideal[:, 1, :, special:, :, special:] = every
    ideal[:, 0, 1:, special:, 0, special:] = targets[:, 1:, :, 0]
    sharp = tokens**0.5 * (ideal + 1e-6).log().flatten(4, 5).flatten(2, 3)
    right = matching_loss([(sharp, keys)], targets, special, settings)
    uniform = matching_loss([(0 * sharp, keys)], targets, special, settings)
    assert float(uniform['matching']) == pytest.approx(torch.tensor(float(tokens)).log(), rel=1e-4)
    assert float(uniform['matching_first']) < 0.3
    assert float(right['matching_first']) > 0.95
    wrong = matching_loss([(sharp.roll(1, dims=2), keys)], targets, special, settings)
    assert right['matching'] < wrong['matching'] / 3


def test_recording_attention_changes_no_result_and_ends():
    model = new_model().eval()
    images = DATASET.batch(0, 2, 3).images
    plain = model(images, heads=('camera',)).pose_encodings[-1]
    with record_attention(model, MATCHING) as records:
        while_recorded = model(images, heads=('camera',)).pose_encodings[-1]
    assert torch.equal(plain, while_recorded)
    assert [tuple(q.shape) for q, _ in records] == [(2, 2, 3 * 11, 16)]
    model(images, heads=('camera',))
    assert len(records) == 1


# --- several processes


def run_rank(rank, port, path):
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    trainer = Trainer(new_model(), DATASET, replace(SETTINGS, precision='float32', matching=None))
    for _ in range(2):
        trainer.step()
    torch.save((weights_of(trainer), trainer.validate(DATASET)), path / f'{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context('forkserver')
    # Import once what takes longest; the optimiser imports torch._dynamo.
    start.set_forkserver_preload(['torch._dynamo', 'vggt_ros.lab.training.trainer'])
    ranks = [start.Process(target=run_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    (one, found), (other, found_by_other) = (
        torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)
    )
    assert_same(one, other)
    assert found == found_by_other
    alone = Trainer(
        new_model(), DATASET, replace(SETTINGS, precision='float32', matching=None, accumulate=2)
    )
    for _ in range(2):
        alone.step()
    for name, value in weights_of(alone).items():
        torch.testing.assert_close(one[name], value, msg=name, atol=1e-5, rtol=1e-3)
    assert alone.validate(DATASET) == pytest.approx(found, rel=0.05)
