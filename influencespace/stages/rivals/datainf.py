"""DataInf of every pair of the pool by the proxy of all pairs: datainf.parquet."""

from influencespace.engine.placement import Resources, fitting
from influencespace.run import Run, Workers
from influencespace.stages.scoring.memory import scoring_bytes
from influencespace.stages.scoring.scoring import ScoreColumn, ScoringInputs, make_estimator, scoring_pass

NAME = "datainf"


def write_datainf(run: Run, workers: Workers) -> None:
    """Write datainf.parquet, of the first round's pool and proxies."""
    inputs = ScoringInputs.of(run.first)
    rows, size = len(inputs.pool), run.config.influence.bucket_size
    needs = Resources(memory=fitting(scoring_bytes(inputs, size), workers.engine.machines))
    with scoring_pass(workers, inputs, size, rows, resources=needs) as scoring:
        scorer = scoring.fit(make_estimator(NAME, {}), inputs.problem(path=False), rows)
        starts = scoring.write(NAME, ScoreColumn(scorer), range(rows), label=NAME)
    workers.join(NAME, starts)
