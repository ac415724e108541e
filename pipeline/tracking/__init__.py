"""The one seam to MLflow: runs, metrics, sample grids, published checkpoints and their results.

The driver is the only writer. It connects (and creates the default store) before any worker starts, since several
processes that create one sqlite store at the same time corrupt it.
"""

from pipeline.tracking.checkpoints import Checkpoint
from pipeline.tracking.leases import Lease, LostLeaseError, Standing, standing
from pipeline.tracking.recorded import RecordedRun
from pipeline.tracking.runs import TIMESTAMP, DataSetInput, MetricRecord, TakenOverError, TrackedRun
from pipeline.tracking.store import Tracker

__all__ = ["TIMESTAMP", "Checkpoint", "DataSetInput", "Lease", "LostLeaseError", "MetricRecord"]
__all__ += ["RecordedRun", "Standing", "TakenOverError", "TrackedRun", "Tracker", "standing"]
