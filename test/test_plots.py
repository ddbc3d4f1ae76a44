# SPDX-License-Identifier: Apache-2.0
"""The demo's figure and table of topics."""

import dataclasses
import math

import cv2
import numpy as np
import pytest

from vggt_ros.lab.evaluation.plots import RunFigure, draw_run
from vggt_ros.lab.node.topic_timing import TopicTiming, timing_table


@pytest.fixture(scope='module')
def run():
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (9, 1, 1))
    poses[:, 0, 3] = np.linspace(0, 2, 9)
    return RunFigure(
        title='a run',
        warning='',
        trajectory_note='',
        unit='m',
        estimate=poses,
        truth=poses,
        image=rng.integers(0, 255, (24, 32, 3)).astype(np.uint8),
        depth=rng.uniform(1, 2, (24, 32)),
        cloud=rng.normal(size=(500, 3)),
        cloud_colours=rng.integers(0, 255, (500, 3)).astype(np.uint8),
        table='topic  messages',
    )


def draw(run, folder):
    draw_run(run, folder / 'figure.png')
    return cv2.imread(str(folder / 'figure.png'))


@pytest.fixture(scope='module')
def plain_figure(run, tmp_path_factory):
    return draw(run, tmp_path_factory.mktemp('plain'))


def test_the_warning_is_visible(run, plain_figure, tmp_path):
    def red_pixels(image):
        return int(((image[..., 2] > 180) & (image[..., :2].max(-1) < 20)).sum())

    warned = red_pixels(draw(dataclasses.replace(run, warning='not a reconstruction'), tmp_path))
    assert warned > red_pixels(plain_figure) + 2000


def test_a_run_without_truth_valid_depth_or_points_is_drawn(run, plain_figure, tmp_path):
    empty = dataclasses.replace(
        run,
        truth=None,
        depth=np.full((24, 32), np.nan),
        cloud=np.zeros((0, 3)),
        cloud_colours=np.zeros((0, 3), np.uint8),
    )
    assert draw(empty, tmp_path).shape == plain_figure.shape


def test_rate_and_latency_are_computed_from_the_messages():
    timing = TopicTiming()
    for i in range(11):
        timing.add(arrival_ns=i * 100_000_000 + 30_000_000, stamp_ns=i * 100_000_000)
    assert timing.rate == pytest.approx(10.0)
    assert timing.latency_ms(50) == pytest.approx(30.0)
    assert math.isnan(TopicTiming().rate) and math.isnan(TopicTiming().latency_ms(95))


def test_the_table_has_a_row_for_each_topic_even_without_messages():
    busy = TopicTiming()
    busy.add(2_000_000, 1_000_000)
    rows = timing_table({'/busy': busy, '/silent/topic': TopicTiming()}).splitlines()
    assert len({len(row) for row in rows}) == 1
    assert rows[2].split() == ['/busy', '1', '-', '1', '1']
    assert rows[3].split() == ['/silent/topic', '0', '-', '-', '-']
