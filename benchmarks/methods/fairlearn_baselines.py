"""What fairlearn's users would do about biased labels; both need the group of every profile, influence does not."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from influencespace.core.arrays import BoolArray, FloatArray, IntArray, Labels


def uncorrelated(inputs: FloatArray, group: Labels, train: IntArray) -> FloatArray:
    """Inputs (n, D) less what is linear in the group, as fitted on the profiles to train on; needs the group at the test too."""
    from fairlearn.preprocessing import CorrelationRemover

    groups = (group[:, None] == np.unique(group)[1:]).astype(np.float64)
    whole = np.column_stack([groups, inputs])
    remover = CorrelationRemover(sensitive_feature_ids=list(range(groups.shape[1]))).fit(whole[train])
    cleaned: FloatArray = remover.transform(whole)
    return cleaned


def equal_decisions(
    inputs: FloatArray, good: BoolArray, group: Labels, train: IntArray, test: IntArray
) -> FloatArray:
    """Chance (m,) that a test profile is decided for, by a logistic classifier of (biased) `good` under demographic parity.

    The reduction of Agarwal et al. 2018 (arXiv 1803.02453), at the package's defaults.
    """
    from fairlearn.reductions import DemographicParity, ExponentiatedGradient

    reduction = ExponentiatedGradient(LogisticRegression(max_iter=1000), DemographicParity())
    reduction.fit(inputs[train], good.astype(int), sensitive_features=group[train])
    chance: FloatArray = reduction._pmf_predict(inputs[test])[:, 1]
    return chance
