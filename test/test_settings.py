# SPDX-License-Identifier: Apache-2.0
"""Each setting has one name, a range and a description; errors name the bad value."""

from __future__ import annotations

import pytest

from vggt_ros.settings import Settings, WindowSettings, all_settings


def test_every_setting_has_a_description_and_a_unique_name() -> None:
    names = [entry.name for entry in all_settings()]
    assert len(names) == len(set(names))
    assert all(len(entry.metadata['description']) > 20 for entry in all_settings())


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'window_size': 1}, 'window_size is 1, expected at least 2'),
        ({'window_size': 4, 'window_stride': 4}, 'window_stride is 4, expected less than'),
        ({'window_size': 4.0}, r'window_size is 4.0 \(float\), expected int'),
        ({'min_parallax': float('nan')}, 'min_parallax is nan, expected at least 0'),
        ({'min_parallax': 2.0}, 'min_parallax is 2.0, expected at most 1'),
        ({'precision': 'int3'}, "precision is 'int3', expected one of auto, float32"),
        ({'resolution': 100}, 'resolution is 100, expected 0 or a multiple of 14'),
        ({'colour': 'red'}, 'unknown settings: colour'),
    ],
)
def test_errors_name_the_bad_value_and_the_expected_range(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_flat(values)


def test_flat_values_are_assigned_to_their_groups() -> None:
    settings = Settings.from_flat({'window_size': 6, 'max_points': 7, 'max_stamp_gap': 2})
    assert (settings.window.window_size, settings.cloud.max_points) == (6, 7)
    assert settings.window.window_stride == WindowSettings().window_stride
