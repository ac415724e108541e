"""What Prometheus sees of a run: scraped from the metrics port of a real local cluster."""

import time
import urllib.request

import pytest

from pipeline import cluster
from pipeline.training.gauges import GAUGES, Gauges


def scraped(address: str) -> dict[str, float]:
    """Our gauges of the run ``a-run``, by name."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    ours = [line for line in lines if line.startswith("ray_ddpm_") and 'run="a-run"' in line]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in ours}


@pytest.mark.slow
def test_the_values_of_a_run_appear_on_the_metrics_port_of_a_cluster_without_dashboard(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with cluster.connect(num_cpus=1):
        import ray

        gauges = Gauges("a-run")
        record = {"step": 50, "train/loss": 0.25, "perf/images_per_second": 1400.0, "perf/data_wait_ratio": 0.125}
        gauges.show(record | {"data/bad_images": 2})
        gauges.show(record | {"step": 75, "data/bad_images": 1})
        gauges.show_distance(96.5)
        node = ray.nodes()[0]
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline = time.monotonic() + 60
        while len(found := scraped(address)) < len(GAUGES):
            assert time.monotonic() < deadline, found
            time.sleep(1)
        gauges.close()
        while scraped(address)["ray_ddpm_training"] != 0:
            assert time.monotonic() < deadline, "an evaluation that follows would look like training that hangs"
            time.sleep(1)
    assert found == {
        "ray_ddpm_training": 1,
        "ray_ddpm_step": 75,
        "ray_ddpm_loss": 0.25,
        "ray_ddpm_images_per_second": 1400,
        "ray_ddpm_data_wait_ratio": 0.125,
        "ray_ddpm_bad_images": 3,
        "ray_ddpm_distance": 96.5,
    }
    assert capfd.readouterr().err == ""
