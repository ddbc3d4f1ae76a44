# SPDX-License-Identifier: Apache-2.0
"""Camera head: poses and fields of view of all frames, refined iteratively.

Each iteration conditions the camera tokens on the current estimate and adds a correction. The
result stays encoded, see `Prediction.pose_encodings`; `vggt_ros.geometry.camera` decodes it.

Source: VGGT (arXiv 2503.11651), section 3.3; DiT (arXiv 2212.09748) for the modulation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vggt_ros.geometry.camera import POSE_ENCODING_SIZE
from vggt_ros.model.block import Block, Mlp
from vggt_ros.model.config import VGGTConfig

FOV_INDEX = 7  # of the first field of view in a pose encoding
INITIAL_FOV = (0.8, 1.0)  # radians, vertical and horizontal: an ordinary camera


class CameraHead(nn.Module):
    """Iterative pose refinement."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, camera = 2 * config.embed_dim, config.camera
        self.iterations = camera.num_iterations
        self.token_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_ENCODING_SIZE))
        self.embed_pose = nn.Linear(POSE_ENCODING_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.trunk = nn.ModuleList(
            Block(dim, camera.num_heads, camera.mlp_ratio) for _ in range(camera.trunk_depth)
        )
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = Mlp(dim, dim // 2, POSE_ENCODING_SIZE)

        self._init_near_identity()

    def _init_near_identity(self) -> None:
        """Initialise so that all cameras are at the origin and look along z.

        PyTorch's default would give a random quaternion, which can be near zero or flip its sign
        in training, and a field of view that the ReLU may clip to zero.
        """
        with torch.no_grad():
            self.pose_branch.fc2.weight.mul_(0.1)
            pose = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, *INITIAL_FOV)
            # Divided here: on the meta device a division makes torch import its compiler.
            self.pose_branch.fc2.bias.copy_(torch.tensor([x / self.iterations for x in pose]))

    def forward(self, camera_tokens: Tensor) -> list[Tensor]:
        """
        Estimate the poses of all frames.

        :param camera_tokens: (B, S, 2C), token 0 of each frame in the last layer.
        :returns: one (B, S, 9) per iteration; the last is the best.
        """
        tokens = self.token_norm(camera_tokens)
        pose = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        encodings = []
        for iteration in range(self.iterations):
            delta = self.pose_delta(tokens, pose)
            # Detached, so that each iteration is trained by its own correction alone.
            pose = delta if iteration == 0 else pose + delta
            encodings.append(activate_pose(pose))
            pose = pose.detach()
        return encodings

    def pose_delta(self, tokens: Tensor, pose: Tensor) -> Tensor:
        """Correction of the raw `pose` (B, S, 9), given the normalised tokens (B, S, 2C)."""
        shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, dim=-1)
        x = tokens + gate * (self.adaln_norm(tokens) * (1 + scale) + shift)
        for block in self.trunk:
            x = block(x)
        delta: Tensor = self.pose_branch(self.trunk_norm(x))
        return delta


def activate_pose(raw: Tensor) -> Tensor:
    """Translation and quaternion unchanged, fields of view clipped to at least 0."""
    return torch.cat((raw[..., :FOV_INDEX], raw[..., FOV_INDEX:].relu()), dim=-1)
