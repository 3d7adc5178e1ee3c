"""The one scorer: evaluation and publication rank with this code, so the metric is about what ships.

A scorer gives the scores of a block of users for the whole catalogue; `recommend` gives the K best without ever holding
them. What a user has seen is masked from compact lists. Equal scores are ordered by item_idx.
"""

from ncf_dist.scoring.blocks import ModelScorer, PopularityScorer, Scorer, recommend
from ncf_dist.scoring.topk import Lists, catalogue_rank, mask, top_k

__all__ = ["Lists", "ModelScorer", "PopularityScorer", "Scorer", "catalogue_rank", "mask", "recommend", "top_k"]
