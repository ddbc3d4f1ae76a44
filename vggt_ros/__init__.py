# SPDX-License-Identifier: Apache-2.0
"""
VGGT for ROS 2: camera frames in, camera poses, depth and a map out.

    from vggt_ros import Reconstructor

    scene = Reconstructor('facebook/VGGT-1B').run('drive.mcap')

Importing this package does nothing: no ROS, no torch, no files; names are imported at their first
use. `extend_path` lets the source tree find the generated `vggt_ros.msg`, which is in the folder
that colcon installs into.
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_ros.frames.frame import Calibration, Frame
    from vggt_ros.mapping.map_update import MapUpdate
    from vggt_ros.model.checkpoint import CheckpointError
    from vggt_ros.offline.scene import Scene
    from vggt_ros.reconstructor import Reconstructor

__path__ = extend_path(__path__, __name__)
__version__ = '0.1.0'
__all__ = ['Calibration', 'CheckpointError', 'Frame', 'MapUpdate', 'Reconstructor', 'Scene']

_MODULES = {
    'Calibration': 'vggt_ros.frames.frame',
    'CheckpointError': 'vggt_ros.model.checkpoint',
    'Frame': 'vggt_ros.frames.frame',
    'MapUpdate': 'vggt_ros.mapping.map_update',
    'Reconstructor': 'vggt_ros.reconstructor',
    'Scene': 'vggt_ros.offline.scene',
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_MODULES[name]), name)
