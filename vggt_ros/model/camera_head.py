# SPDX-License-Identifier: Apache-2.0
"""Camera head: the camera tokens of all frames to poses and fields of view, refined in steps.

Each step conditions the same tokens on the pose found so far and adds a correction. The result
stays encoded (9 numbers, see `Prediction.pose_encodings`); `vggt_ros.geometry` decodes it.

Source: VGGT (arXiv 2503.11651), section 3.3; DiT (arXiv 2212.09748) for the modulation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vggt_ros.model.block import Block, Mlp
from vggt_ros.model.config import VGGTConfig

POSE_SIZE = 9  # translation 3, quaternion xyzw 4, vertical and horizontal field of view 2
FIRST_FOV = 7
START_FOV = (0.8, 1.0)  # radians, vertical and horizontal: an ordinary camera


class CameraHead(nn.Module):
    """Iterative pose refinement."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, camera = 2 * config.embed_dim, config.camera
        self.iterations = camera.num_iterations
        self.token_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))
        self.embed_pose = nn.Linear(POSE_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.trunk = nn.ModuleList(
            Block(dim, camera.num_heads, camera.mlp_ratio) for _ in range(camera.trunk_depth)
        )
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = Mlp(dim, dim // 2, POSE_SIZE)

        self._start_near_identity()

    def _start_near_identity(self) -> None:
        """Begin with cameras that see forward from the origin.

        PyTorch's default would begin with a random quaternion, which can be near zero or flip its
        sign in training, and with a field of view that the ReLU may have cut to nothing.
        """
        with torch.no_grad():
            self.pose_branch.fc2.weight.mul_(0.1)
            start = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, *START_FOV)
            # Divided here: on the meta device a division makes torch import its compiler.
            self.pose_branch.fc2.bias.copy_(torch.tensor([x / self.iterations for x in start]))

    def forward(self, camera_tokens: Tensor) -> list[Tensor]:
        """
        Find the poses of all frames.

        :param camera_tokens: (B, S, 2C), token 0 of each frame in the last round.
        :returns: one (B, S, 9) per refinement step, the last is the best.
        """
        tokens = self.token_norm(camera_tokens)
        pose = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        encodings = []
        for step in range(self.iterations):
            delta = self.correction(tokens, pose)
            # Detached, so that each step is trained by its own correction alone.
            pose = delta if step == 0 else pose + delta
            encodings.append(activate_pose(pose))
            pose = pose.detach()
        return encodings

    def correction(self, tokens: Tensor, pose: Tensor) -> Tensor:
        """What to add to the raw `pose` (B, S, 9), given the normalised tokens (B, S, 2C)."""
        shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, dim=-1)
        x = tokens + gate * (self.adaln_norm(tokens) * (1 + scale) + shift)
        for block in self.trunk:
            x = block(x)
        delta: Tensor = self.pose_branch(self.trunk_norm(x))
        return delta


def activate_pose(raw: Tensor) -> Tensor:
    """Translation and quaternion as they are, fields of view at least 0."""
    return torch.cat((raw[..., :FIRST_FOV], raw[..., FIRST_FOV:].relu()), dim=-1)
