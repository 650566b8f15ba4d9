"""The synthetic world: rendered scenes with captions, and dirt whose truth is known."""

from influencespace.data.synthetic.config import SPLITS, Split, WorldConfig
from influencespace.data.synthetic.pairs import PairTruth, Plan, plan_image
from influencespace.data.synthetic.world import count_shards, write_shard, write_truth, write_world

__all__ = [
    "SPLITS",
    "PairTruth",
    "Plan",
    "Split",
    "WorldConfig",
    "count_shards",
    "plan_image",
    "write_shard",
    "write_truth",
    "write_world",
]
