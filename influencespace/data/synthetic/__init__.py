"""The synthetic world: rendered scenes with captions, and dirt whose truth is known."""

from influencespace.data.synthetic.config import SPLITS, Split, WorldConfig
from influencespace.data.synthetic.pairs import PairTruth, Plan, WorldImage, plan_image, scene_pairs
from influencespace.data.synthetic.world import count_shards, write_shard, write_truth, write_world

__all__ = [
    "SPLITS",
    "PairTruth",
    "Plan",
    "Split",
    "WorldConfig",
    "WorldImage",
    "count_shards",
    "plan_image",
    "scene_pairs",
    "write_shard",
    "write_truth",
    "write_world",
]
