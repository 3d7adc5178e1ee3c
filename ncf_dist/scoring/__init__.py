"""The one scorer: evaluation and publication rank with this code, so the metric is about what ships.

A scorer gives scores a block at a time. One pass over the blocks keeps the K best and finds the places of held-out
items, and never holds users × items. What a user has seen is masked from compact lists. Equal scores are ordered by
item_idx.
"""

from ncf_dist.scoring.blocks import ModelScorer, PopularityScorer, Scorer
from ncf_dist.scoring.ranking import Ranking, Scores, by_item, rank, recommend, scores_of
from ncf_dist.scoring.topk import Lists, mask, top_k

# fmt: off
__all__ = [
    "Lists", "ModelScorer", "PopularityScorer", "Ranking", "Scorer", "Scores", "by_item", "mask", "rank", "recommend",
    "scores_of", "top_k",
]
