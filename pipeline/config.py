"""Every knob, once. A knob's leaf name is its CLI flag, MLflow param, Tune key and key in ``meta.json``. Knows nobody.

Configs are frozen. Nested groups exist for ``--help`` and for passing less around; leaf names are unique across groups,
so a config flattens to one dictionary of JSON values and back (``to_flat``, ``from_flat``, ``override``).
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import tyro

from pipeline.errors import UserError

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "ClusterConfig",
    "ComputeConfig",
    "ConvertConfig",
    "DataConfig",
    "EvaluateConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "ProtocolConfig",
    "RecipeConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "ShowConfig",
    "Switch",
    "TrainConfig",
    "TuneConfig",
    "as_params",
    "changes",
    "from_flat",
    "override",
    "to_flat",
]

Metric = Literal["fd", "fd-interval", "fd-infinity", "kid", "prdc", "is", "bpd"]
METRICS: tuple[str, ...] = typing.get_args(Metric)
"""What an evaluation can measure."""
OBJECTIVES: tuple[str, ...] = ("fd", "fd-infinity", "kid", "bpd")
"""Of these, what a sweep can minimise: comparable between schedules, smaller is better."""

Flat = dict[str, Any]
Switch = tyro.conf.FlagCreatePairsOff[bool]
"""A flag that can only be set; others also have a ``--no-`` form, to override a preset."""
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Noise schedule: how fast the forward process destroys an image."""

    schedule: Literal["linear", "cosine", "quadratic", "sigmoid"] = "linear"
    """Shape of the schedule."""
    T: int = 1000
    """Diffusion steps of the forward process."""
    beta_start: float = 1e-4
    """First beta at T=1000; scaled by 1000/T so that x_T keeps its signal-to-noise ratio. Not used by cosine."""
    beta_end: float = 0.02
    """Last beta at T=1000; scaled likewise. Not used by cosine."""
    cosine_s: float = 0.008
    """Offset s of the cosine schedule."""
    max_beta: float = 0.999
    """Largest beta of the cosine schedule."""
    allow_signal_at_T: bool = False
    """Accept a schedule that leaves signal in x_T (sampling from pure noise is then wrong)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """UNet of the DDPM paper."""

    image_size: int = 8
    """Height and width of the images, pixels; must match the data set."""
    image_channels: int = 1
    """Channels of the images: 1 grey, 3 RGB; must match the data set."""
    base_channels: int = 32
    """Feature channels at full resolution."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Feature channels of each resolution level, as multiples of base_channels."""
    num_res_blocks: int = 1
    """Residual blocks of each level."""
    attention_resolutions: tuple[int, ...] = (4,)
    """Resolutions that get self-attention, pixels."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks."""
    prediction: Literal["eps", "v", "x_0"] = "eps"
    """What the network predicts: the noise, v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, or the image."""
    num_classes: int = 0
    """Classes that the network is told (shards with labels); 0: unconditional."""

    def __post_init__(self) -> None:
        _check(self.image_size >= 1, "--image-size", self.image_size, "at least 1")
        _check(self.image_channels in (1, 3), "--image-channels", self.image_channels, "1 (grey) or 3 (RGB)")
        _check(0 <= self.dropout < 1, "--dropout", self.dropout, "in [0, 1)")
        _check(self.num_classes >= 0, "--num-classes", self.num_classes, "at least 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, in which order."""

    data: str = "digits"
    """Data set of shards: a path, s3:// URI, or a name under $DDPM_HOME/data."""
    batch_size: int = 64
    """Images of a global batch, over all workers."""
    num_streams: int = 16
    """Canonical streams; divides batch_size, at least one for each worker. Part of the image order."""
    random_flip: bool = False
    """Mirror each image with probability 1/2."""
    loader_workers: int = 0
    """Processes beside each worker that read and decode; 0: threads of the worker."""
    decode_threads: int = 2
    """Threads of each worker that decode images; processes have one each."""
    loader_cache_bytes: int = 256 * 2**20
    """Memory for decoded images in each worker, and as much again for remote shards, bytes."""
    prefetch_batches: int = 2
    """Batches prepared ahead."""
    cache_dir: str | None = None
    """Folder on a local disk where shards from s3:// are kept, shared by all workers of a machine."""
    cache_bytes: int = 50 * 2**30
    """Largest size of cache_dir, bytes; the shards used longest ago are dropped."""
    on_bad_data: Literal["stop", "skip"] = "stop"
    """Missing or damaged shards and images: stop, or take other images in their place and count them."""
    max_bad_fraction: float = 0.01
    """With --on-bad-data skip: stop when more than this part of an epoch's images is bad."""
    storage_patience_seconds: float = 300.0
    """How long reading waits for storage that does not answer, seconds."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        _check(self.loader_workers >= 0, "--loader-workers", self.loader_workers, "at least 0")
        _check(self.decode_threads >= 1, "--decode-threads", self.decode_threads, "at least 1")
        _check(self.loader_cache_bytes >= 0, "--loader-cache-bytes", self.loader_cache_bytes, "at least 0")
        _check(self.prefetch_batches >= 1, "--prefetch-batches", self.prefetch_batches, "at least 1")
        _check_folder("--cache-dir", self.cache_dir)
        _check(self.cache_bytes >= 1, "--cache-bytes", self.cache_bytes, "at least 1")
        _check(0 <= self.max_bad_fraction <= 1, "--max-bad-fraction", self.max_bad_fraction, "in [0, 1]")
        _check(
            self.storage_patience_seconds >= 0,
            "--storage-patience-seconds",
            self.storage_patience_seconds,
            "at least 0",
        )
        _check(self.num_streams >= 1, "--num-streams", self.num_streams, "at least 1")
        _check(
            self.batch_size % self.num_streams == 0,
            "--batch-size",
            self.batch_size,
            f"a multiple of --num-streams {self.num_streams}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and the exponential moving average of its weights."""

    lr: float = 2e-3
    """Learning rate after warm-up."""
    lr_warmup_steps: int = 100
    """Steps over which the learning rate grows linearly from 0."""
    lr_decay: Literal["constant", "cosine"] = "cosine"
    """What the learning rate does after warm-up, until the last step."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    grad_clip: float = 1.0
    """Largest gradient norm, after the all-reduce; 0 turns clipping off."""
    ema_decay: float = 0.99
    """Decay of the weight average, per step."""
    ema_warmup: bool = True
    """Use min(ema_decay, (1 + step) / (10 + step)), so that early averages forget the initial weights."""
    ema_power: tuple[float, ...] = ()
    """Relative widths of power-function averages kept beside the EMA (EDM2), e.g. 0.05 0.10; any width can follow."""

    def __post_init__(self) -> None:
        _check(0 < self.lr < math.inf, "--lr", self.lr, "above 0 and finite")
        _check(self.adam_eps > 0, "--adam-eps", self.adam_eps, "above 0")
        _check(self.lr_warmup_steps >= 0, "--lr-warmup-steps", self.lr_warmup_steps, "at least 0")
        _check(self.grad_clip >= 0, "--grad-clip", self.grad_clip, "at least 0")
        _check(0 <= self.ema_decay < 1, "--ema-decay", self.ema_decay, "in [0, 1)")
        for sigma_rel in self.ema_power:
            _check(0 < sigma_rel < 0.28, "--ema-power", sigma_rel, "above 0 and below 0.28")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised."""

    loss_weighting: Literal["simple", "min-snr"] = "simple"
    """simple: unweighted squared error of the prediction; min-snr: clamped signal-to-noise ratio (2303.09556)."""
    min_snr_gamma: float = 5.0
    """Signal-to-noise ratio at which min-snr clamps."""
    label_dropout: float = 0.1
    """Part of the labels that is hidden from a class-conditional network, for classifier-free guidance."""

    def __post_init__(self) -> None:
        _check(self.min_snr_gamma > 0, "--min-snr-gamma", self.min_snr_gamma, "above 0")
        _check(0 <= self.label_dropout <= 1, "--label-dropout", self.label_dropout, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network: float32, or autocast to bfloat16, or to float16 with a loss scaler."""
    tf32: bool = True
    """Let GPUs that have it compute float32 products in TF32 (10 bits of mantissa)."""
    micro_batch_size: int | None = None
    """Most images that a worker puts through the network at once; gradients of its part of the batch are added up."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, faster steps on a GPU."""

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None:
            _check(self.micro_batch_size >= 1, "--micro-batch-size", self.micro_batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray workers of this job."""

    num_workers: int | str = 2
    """Workers that train (DDP) or sample; MIN:MAX trains with as many as there are, while nodes come and go."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: int = 1
    """CPU cores and torch threads of each worker."""
    max_failures: int = 3
    """Worker failures after which the job gives up; each restarts from the last checkpoint."""
    resize_seconds: float = 60.0
    """How often training with MIN:MAX workers looks whether it may grow, seconds."""
    worker_timeout_seconds: float = 300.0
    """A worker awaited for longer (and storage_patience_seconds) counts as hung; training restarts. Seconds."""

    def __post_init__(self) -> None:
        allowed = "a whole number from 1 on, or MIN:MAX with 1 <= MIN <= MAX, for example 2:8"
        words = str(self.num_workers).split(":")
        _check(
            len(words) <= 2 and all(word.isascii() and word.isdigit() for word in words),
            "--num-workers",
            self.num_workers,
            allowed,
        )
        _check(1 <= self.min_workers <= self.max_workers, "--num-workers", self.num_workers, allowed)
        _check(self.resize_seconds > 0, "--resize-seconds", self.resize_seconds, "above 0")
        _check(self.worker_timeout_seconds > 0, "--worker-timeout-seconds", self.worker_timeout_seconds, "above 0")
        _check(self.cpus_per_worker >= 1, "--cpus-per-worker", self.cpus_per_worker, "at least 1")

    @property
    def min_workers(self) -> int:
        """Fewest workers to train with."""
        return int(str(self.num_workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        """Most workers to train with; equals ``min_workers`` unless ``num_workers`` is MIN:MAX."""
        return int(str(self.num_workers).rpartition(":")[2])


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How noise becomes images."""

    sampler: Literal["ddpm", "ddim", "dpm-solver++", "heun"] = "ddim"
    """ddpm: ancestral (DDPM Alg. 2); ddim: DDIM with eta; dpm-solver++ (2M) and heun (EDM): of second order."""
    sampling_steps: int = 50
    """Network evaluations for each image, 1..T, whatever the sampler; guidance makes each twice as large."""
    timestep_spacing: Literal["uniform", "quadratic", "logsnr"] | None = None
    """Timesteps even in t, its root or log-SNR; default: logsnr for dpm-solver++ and heun, uniform for the others."""
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 as much as ddpm with fixed-small."""
    variance: Literal["fixed-small", "fixed-large"] = "fixed-small"
    """Reverse variance of ddpm: the posterior's, or beta_t."""
    x0_clipping: Literal["none", "clip", "dynamic"] = "clip"
    """Predicted images: as they come, cut to [-1, 1], or scaled into it by dynamic thresholding (Imagen)."""
    x0_percentile: float = 0.995
    """Part of an image's values that dynamic thresholding brings into range without cutting."""
    sample_seed: int = 0
    """Seed of the noise (and classes) that images are made from."""
    guidance: float = 1.0
    """Weight of classifier-free guidance: 1 follows the class as trained, more pronounces it, 0 ignores it."""

    def __post_init__(self) -> None:
        _check(self.sampling_steps >= 1, "--sampling-steps", self.sampling_steps, "at least 1")
        _check(0 <= self.eta <= 1, "--eta", self.eta, "in [0, 1]")
        _check(0 < self.x0_percentile <= 1, "--x0-percentile", self.x0_percentile, "above 0 and at most 1")
        _check(self.sample_seed >= 0, "--sample-seed", self.sample_seed, "at least 0")
        _check(0 <= self.guidance < math.inf, "--guidance", self.guidance, "at least 0 and finite")

    @property
    def spacing(self) -> str:
        """The spacing of timesteps: the given one, or the sampler's default."""
        return self.timestep_spacing or ("logsnr" if self.sampler in ("dpm-solver++", "heun") else "uniform")


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """How images are compared with the data set."""

    features: str = "efficientnet-lite0"
    """Feature network: inception gives the FID; efficientnet-lite0 is embedded; module:URI is a TorchScript file."""
    features_sha256: str | None = None
    """Of the file of --features module:URI, which is a program: its hash says whom you trust."""
    inception_weights: str | None = None
    """The FID network's public weight file of 2015: a path or s3:// URI."""
    num_images: int = 2000
    """Images generated for each checkpoint."""
    chunk_size: int = 100
    """Images generated together; part of the protocol, since it changes the last bits of the images."""

    def __post_init__(self) -> None:
        known = self.features in ("efficientnet-lite0", "inception") or self.features.startswith("module:")
        _check(known, "--features", self.features, "efficientnet-lite0, inception or module:URI")
        _check(self.num_images >= 2, "--num-images", self.num_images, "at least 2")
        _check(self.chunk_size >= 1, "--chunk-size", self.chunk_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    preset: Literal["digits", "cifar10", "lsun256", "celebahq256"] = "digits"
    """Named set of defaults (digits: minutes on a laptop; the others: the DDPM paper's). Any other flag overrides."""
    name: str | None = None
    """The run's one identity (Ray, MLflow, folder). The same name again continues the run; left out: a new name."""
    experiment: str = "ddpm"
    """MLflow experiment."""
    seed: int = 0
    """Seed of initial weights, image order, timesteps and noise."""
    steps: int = 1500
    """Optimizer steps."""
    log_every: int = 25
    """Steps between metrics."""
    checkpoint_every: int = 250
    """Steps between checkpoints; at most this many steps are repeated after a failure."""
    keep_checkpoints: int = 2
    """Resumable checkpoints kept in storage; published weights are kept in MLflow."""
    grid_images: int = 64
    """Images of the sample grid logged with every checkpoint."""
    quality_images: int = 128
    """Images of a rough Frechet distance measured for every checkpoint beside training, to see a trend; 0: none."""
    quality_gpus: float = 0.0
    """GPUs for that measurement and the grid, beside those of the workers; 0: idle CPU time."""
    init_from: str | None = None
    """Model folder (a path or s3:// URI) whose weights a new run starts from, instead of drawn ones."""
    audit_dir: str | None = None
    """Local folder where each worker notes which images, timesteps and noise every step used (JSON lines)."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: ScheduleConfig = field(default_factory=ScheduleConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**63, "--seed", self.seed, "in [0, 2**63)")
        for flag in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "grid_images"):
            _check(getattr(self, flag) >= 1, "--" + flag.replace("_", "-"), getattr(self, flag), "at least 1")
        _check_name(self.name)
        _check_folder("--audit-dir", self.audit_dir)
        _check(
            self.quality_images == 0 or self.quality_images >= 2,
            "--quality-images",
            self.quality_images,
            "0 or at least 2",
        )
        _check(self.quality_gpus >= 0, "--quality-gpus", self.quality_gpus, "at least 0")
        _check(
            self.cluster.max_workers <= self.data.num_streams,
            "--num-workers",
            self.cluster.num_workers,
            f"at most --num-streams {self.data.num_streams}",
        )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turns a collection of images into a data set of shards."""

    source: str = "digits"
    """digits, or KIND:PATH: folder archive cifar10 cifar10-test parquet npy npz imagenet webdataset; PATH also s3://."""
    data: str | None = None
    """Data set to write: a path, s3:// URI, or a name under $DDPM_HOME/data. Default: the source's name."""
    image_size: int | None = None
    """Height and width of the images, pixels: square crop, antialiased resize. Default: the source's own."""
    image_channels: int | None = None
    """1 grey, 3 RGB. Default: the source's own, 3 for folders."""
    crop: Literal["center", "pad", "stretch"] = "center"
    """How other shapes become squares: cut to the centre, framed in white, or distorted."""
    image_format: Literal["png", "jpeg", "webp"] = "png"
    """File format of the stored images; png is lossless."""
    image_quality: int = 95
    """Quality of jpeg and webp, 1..100; 100 makes webp lossless."""
    images_per_shard: int = 1000
    """Images of a shard; the last shard holds the rest."""
    shard_bytes: int | None = None
    """Instead of images_per_shard: about this size for each shard, bytes, estimated from a sample of the images."""
    holdout_fraction: float = 0.0
    """Part of the images that goes to a second data set, DATA-holdout, and not to the first."""
    verify: Switch = False
    """Change nothing: read the data set again, check every count and checksum, and decode every image."""

    def __post_init__(self) -> None:
        _check(self.images_per_shard >= 1, "--images-per-shard", self.images_per_shard, "at least 1")
        _check(1 <= self.image_quality <= 100, "--image-quality", self.image_quality, "in 1..100")
        _check(0 <= self.holdout_fraction < 1, "--holdout-fraction", self.holdout_fraction, "in [0, 1)")
        if self.image_size is not None:
            _check(self.image_size >= 1, "--image-size", self.image_size, "at least 1")
        if self.shard_bytes is not None:
            _check(self.shard_bytes >= 1, "--shard-bytes", self.shard_bytes, "at least 1")
        if self.image_channels is not None:
            _check(self.image_channels in (1, 3), "--image-channels", self.image_channels, "1 (grey) or 3 (RGB)")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What the source of an import does not say. Default: as the paper has it; the output names what was assumed."""

    schedule: Literal["linear", "cosine", "quadratic", "sigmoid"] | None = None
    """Shape of its noise schedule."""
    T: int | None = None
    """Diffusion steps of its forward process."""
    beta_start: float | None = None
    """First beta at T=1000 (times 1000/T otherwise). Not used by cosine."""
    beta_end: float | None = None
    """Last beta at T=1000, likewise. Not used by cosine."""
    prediction: Literal["eps", "v", "x_0"] | None = None
    """What its network predicts."""
    variance: Literal["fixed-small", "fixed-large"] | None = None
    """Its reverse variance; the paper has fixed-large for CIFAR-10 (32x32) and fixed-small for 256x256."""
    x0_clipping: Literal["none", "clip", "dynamic"] | None = None
    """What is done to predicted images."""

    def __post_init__(self) -> None:
        if self.T is not None:
            _check(1 <= self.T <= 10**6, "--T", self.T, "in 1..1000000")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turns a model of another library into a model folder, or a model folder into one of diffusers."""

    source: str
    """diffusers:FOLDER or state-dict:FILE to import, model:FOLDER (ours) to export; a path or s3:// URI."""
    destination: str
    """Folder to write: a path or s3:// URI; a relative path is under $DDPM_HOME, as for --checkpoint."""
    image_size: int | None = None
    """Height and width of the images where the source does not tell them (a state dict), pixels."""
    step: int = 0
    """Optimizer steps that an imported model was trained for, as far as known."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)

    def __post_init__(self) -> None:
        kind, _, path = self.source.partition(":")
        allowed = "diffusers:FOLDER, state-dict:FILE or model:FOLDER"
        _check(kind in ("diffusers", "state-dict", "model") and bool(path), "--source", self.source, allowed)
        _check(self.step >= 0, "--step", self.step, "at least 0")
        if self.image_size is not None:
            _check(self.image_size >= 1, "--image-size", self.image_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Generates images from published checkpoints and measures their distance from the data set."""

    run: str | None = None
    """Evaluate the checkpoints of this run that lack the result."""
    pending: Switch = False
    """Evaluate all checkpoints of the experiment that lack the result, newest first."""
    checkpoint: str | None = None
    """Evaluate a model folder (a path or s3:// URI) against --reference and print the result, without MLflow."""
    reference: str | None = None
    """Data set that --checkpoint is compared with: a path, s3:// URI, or a name under $DDPM_HOME/data."""
    report: str | None = None
    """Evaluate nothing: write a report on this experiment, one HTML file, and log it to MLflow."""
    compare: tuple[str, ...] = ()
    """Measure nothing: put stored results side by side, RUN or RUN:STEP each; unlike protocols are refused."""
    experiment: str = "ddpm"
    """MLflow experiment."""
    step: int | None = None
    """Only the checkpoint of this step."""
    last: Switch = False
    """Only the last checkpoint of each run."""
    max_checkpoints: int | None = None
    """Stop after this many checkpoints; the rest stay pending."""
    max_minutes: float | None = None
    """Stop after this time; what is half done is kept and continued by the next evaluation."""
    watch: Switch = False
    """With --pending: look again every --interval seconds, until Ctrl-C."""
    interval: float = 300.0
    """Seconds between two looks of --watch."""
    retry_failed: Switch = False
    """Also evaluate checkpoints that have failed three times."""
    save_images: str | None = None
    """Write the images as data sets RUN-step-N under this path or s3:// URI; a relative path is under $DDPM_HOME."""
    register: str | None = None
    """Registered model whose alias champion goes to the experiment's best model; default: the experiment's name."""
    champion_margin: float = 0.02
    """A new champion must be better by this part of the old one's distance, where its uncertainty is not known."""
    metrics: tuple[Metric, ...] = ("fd",)
    """What to measure; prdc is precision, recall, density and coverage, bpd bits per dimension of --held-out."""
    held_out: str | None = None
    """Data set for --metrics bpd that was not trained on: a path, s3:// URI, or a name under $DDPM_HOME/data."""
    bound_images: int = 200
    """Images of --held-out that bpd is measured on, drawn at random; always the same ones."""
    bound_stride: int = 20
    """bpd evaluates one step of each run of so many, without bias; 1 takes all T."""
    weights: Literal["ema", "raw"] = "ema"
    """With --checkpoint: the average of the weights, or the last ones, which only $DDPM_HOME/runs/NAME/step-N holds."""
    ema_width: float | None = None
    """Instead of the EMA: an average of this relative width, made from the run's --ema-power averages, e.g. 0.08."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @classmethod
    def after(cls, training: TrainConfig, protocol: ProtocolConfig) -> "EvaluateConfig":
        """What follows a training run: its sampler and its workers."""
        return cls(
            pending=True,
            experiment=training.experiment,
            sampling=training.sampling,
            protocol=protocol,
            cluster=training.cluster,
        )

    def __post_init__(self) -> None:
        named = (self.run, self.checkpoint, self.report)
        if sum([self.pending, len(self.compare) > 0, *(name is not None for name in named)]) != 1:
            raise UserError("give one of --run, --pending, --checkpoint, --compare and --report")
        if len(self.compare) == 1:
            raise UserError(f"--compare {self.compare[0]}: give two or more, RUN or RUN:STEP")
        if (self.checkpoint is None) != (self.reference is None):
            raise UserError("--checkpoint and --reference go together: give both or none")
        if self.weights == "raw" and self.checkpoint is None:
            raise UserError("--weights raw: only averages are published; give a folder of runs/NAME as --checkpoint")
        if self.watch and not self.pending:
            raise UserError("--watch looks for pending checkpoints; give --pending as well")
        if self.max_checkpoints is not None:
            _check(self.max_checkpoints >= 1, "--max-checkpoints", self.max_checkpoints, "at least 1")
        if self.max_minutes is not None:
            _check(0 < self.max_minutes < math.inf, "--max-minutes", self.max_minutes, "above 0")
        _check(0 < self.interval < math.inf, "--interval", self.interval, "above 0")
        _check(0 <= self.champion_margin < 1, "--champion-margin", self.champion_margin, "in [0, 1)")
        _check(len(self.metrics) > 0, "--metrics", "(none)", f"some of {' '.join(METRICS)}")
        _check(self.bound_images >= 2, "--bound-images", self.bound_images, "at least 2")
        _check(self.bound_stride >= 1, "--bound-stride", self.bound_stride, "at least 1")
        if "bpd" in self.metrics and self.held_out is None:
            raise UserError(
                "--metrics bpd needs --held-out: a data set that was not trained on; "
                "prepare_data.py --holdout-fraction makes one"
            )
        if "is" in self.metrics and self.protocol.features != "inception":
            raise UserError(f"--metrics is: {self.protocol.features} tells no classes; give --features inception")
        if self.ema_width is not None:
            _check(0 < self.ema_width < 0.28, "--ema-width", self.ema_width, "above 0 and below 0.28")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """A sweep over noise schedules: every trial is one training run, judged by one fixed protocol."""

    restore: str | None = None
    """Continue the sweep of this name after its driver died, as it was started; takes no other flag."""
    report: str | None = None
    """Run nothing: write the report on the sweep of this name, one HTML file, from what MLflow has now."""
    schedules: tuple[Literal["linear", "cosine", "quadratic", "sigmoid"], ...] = ("linear", "cosine")
    """Schedule types to try."""
    Ts: tuple[int, ...] = (100, 1000)
    """Values of T to try."""
    beta_ranges: tuple[str, ...] = ("1e-4:0.02",)
    """Beta ranges START:END (values at T=1000) to try; cosine has none."""
    search: tuple[str, ...] = ()
    """Further knobs to try: KNOB=choice(A,B), uniform(A,B), loguniform(A,B) or randint(A,B)."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """All combinations, random ones, or those that Optuna's TPE proposes from the results so far."""
    num_trials: int = 20
    """Combinations that random and optuna try."""
    seeds: int = 1
    """Runs of each combination, with seeds from --seed on; from 2 on their spread is known."""
    objective: str = "fd"
    """What is minimised: fd, fd-infinity, kid, or bpd of --held-out."""
    held_out: str | None = None
    """Data set for --objective bpd that was not trained on: a path, s3:// URI, or a name under $DDPM_HOME/data."""
    early_stopping: Switch = False
    """Stop trials early that are not among the best (ASHA), by the objective of fewer images."""
    rung_images: int = 500
    """Images of the objective that early stopping looks at."""
    first_rung: int | None = None
    """Step at which early stopping looks first, a multiple of --checkpoint-every, which is the default."""
    reduction_factor: int = 3
    """Of so many trials one goes on beyond a rung; the next rung is at so many times the step."""
    sampling_search: tuple[str, ...] = ()
    """Sampling knobs to try on the trained models without training again, e.g. sampling_steps=choice(10,50)."""
    register: str | None = None
    """Registered model whose alias champion goes to the best trial's checkpoint."""
    max_concurrent_trials: int | None = None
    """Trials at the same time; default: as many as the cluster's CPUs (GPUs) hold now. Set it if the cluster grows."""
    base: TrainConfig = field(default_factory=TrainConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)

    def __post_init__(self) -> None:
        _check(len(self.schedules) > 0, "--schedules", self.schedules, "at least one schedule")
        _check(len(self.Ts) > 0, "--Ts", self.Ts, "at least one T")
        _check(len(self.beta_ranges) > 0, "--beta-ranges", self.beta_ranges, "at least one range")
        _check_objective(self.objective, self.held_out)
        for flag in ("num_trials", "seeds"):
            _check(getattr(self, flag) >= 1, "--" + flag.replace("_", "-"), getattr(self, flag), "at least 1")
        _check(self.rung_images >= 2, "--rung-images", self.rung_images, "at least 2")
        _check(self.reduction_factor >= 2, "--reduction-factor", self.reduction_factor, "at least 2")
        if self.max_concurrent_trials is not None:
            _check(self.max_concurrent_trials >= 1, "--max-concurrent-trials", self.max_concurrent_trials, "at least 1")
        for text in self.beta_ranges:
            self.parse_beta_range(text)
        for knob, instead in {
            "schedule": "schedules",
            "T": "Ts",
            "beta_start": "beta-ranges",
            "beta_end": "beta-ranges",
        }.items():
            given = getattr(self.base.diffusion, knob)
            if given != getattr(ScheduleConfig(), knob):
                raise UserError(f"--{knob.replace('_', '-')} {given}: a sweep tries several; give --{instead}")

    @staticmethod
    def parse_beta_range(text: str) -> tuple[float, float]:
        """Reads ``START:END``.

        Raises:
            UserError: Not two numbers with a colon between them.
        """
        try:
            start, end = (float(part) for part in text.split(":"))
        except ValueError:
            raise UserError(f"--beta-ranges {text!r} is not START:END; for example 1e-4:0.02") from None
        return start, end


Picture = Literal["schedules", "forward", "trajectory", "progressive", "sharing", "interpolation", "neighbours"]


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Draws noise schedules, the forward process, and what a model does on its way from noise to images."""

    run: str | None = None
    """Show the last published checkpoint of this run."""
    checkpoint: str | None = None
    """Show a model folder (a path or s3:// URI), without MLflow."""
    step: int | None = None
    """With --run: the checkpoint of this step."""
    data: str | None = None
    """Data set of real images: a path, s3:// URI, or a name under $DDPM_HOME/data. Default: the model's, or digits."""
    pictures: tuple[Picture, ...] = typing.get_args(Picture)
    """What to draw; without --run or --checkpoint only schedules and forward."""
    num_images: int = 6
    """Images that each picture shows."""
    schedules: tuple[Literal["linear", "cosine", "quadratic", "sigmoid"], ...] = ("linear", "cosine")
    """Schedules to draw, beside that of the model."""
    Ts: tuple[int, ...] = (1000,)
    """Values of T to draw."""
    beta_ranges: tuple[str, ...] = ("1e-4:0.02",)
    """Beta ranges START:END (values at T=1000) to draw; cosine has none."""
    out: str | None = None
    """Folder of the PNG files and index.html; a relative one is under $DDPM_HOME/show. Default: a name by the model."""
    log: Switch = False
    """With --run: log the pictures to the run in MLflow as well."""
    use_gpu: Switch = False
    """Compute on a GPU."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.run is not None and self.checkpoint is not None:
            raise UserError("give --run or --checkpoint, not both")
        for flag, given in {"--step": self.step is not None, "--log": self.log}.items():
            if given and self.run is None:
                raise UserError(f"{flag} needs --run")
        _check(1 <= self.num_images <= 32, "--num-images", self.num_images, "in 1..32")
        for words, flag in ((self.pictures, "--pictures"), (self.schedules, "--schedules"), (self.Ts, "--Ts")):
            _check(len(words) > 0, flag, "(none)", "at least one value")
        for text in self.beta_ranges:
            TuneConfig.parse_beta_range(text)


def to_flat(config: Any) -> Flat:
    """A config as one dictionary of JSON values by leaf name (tuples become lists)."""
    flat: Flat = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        leaves = to_flat(value) if dataclasses.is_dataclass(value) else {entry.name: _jsonable(value)}
        assert not flat.keys() & leaves.keys(), f"two knobs of one name: {flat.keys() & leaves.keys()}"
        flat |= leaves
    return flat


def as_params(flat: Flat) -> dict[str, str]:
    """A flat config as text by name, as MLflow keeps params: strings as they are, other values as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


def changes(now: dict[str, str], then: Mapping[str, str], *, allowed: Collection[str]) -> list[str]:
    """What differs between two configs as params, in words; names that only one of them has do not count."""
    return [
        f"{key} was {then[key]}, now {text}"
        for key, text in now.items()
        if key in then and key not in allowed and then[key] != text
    ]


def from_flat(cls: type[C], flat: Flat) -> C:
    """The inverse of ``to_flat``; names left out take their default.

    Raises:
        UserError: A name that is no knob; the nearest one is offered.
    """
    return override(cls(), flat)


def override(config: C, flat: Flat) -> C:
    """A copy of a config with some leaves replaced. Raises as ``from_flat``."""
    known = to_flat(config).keys()
    for name in flat.keys() - known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(sorted(known))}"
        raise UserError(f"unknown knob {name!r}{hint}")
    return typing.cast(C, _replace(config, flat))


def _replace(config: Any, flat: Flat) -> Any:
    hints = typing.get_type_hints(type(config))
    changes = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            changes[entry.name] = _replace(value, flat)
        elif entry.name in flat:
            changes[entry.name] = _typed(flat[entry.name], hints[entry.name])
    return dataclasses.replace(config, **changes)


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any, hint: Any) -> Any:
    """JSON knows no tuples and may turn 1.0 into 1: restores both from the field's type."""
    origins = (typing.get_origin(hint), *(typing.get_origin(option) for option in typing.get_args(hint)))
    if isinstance(value, list) and tuple in origins:
        return tuple(value)
    plain_int = isinstance(value, int) and not isinstance(value, bool)
    accepts_float = hint is float or (isinstance(hint, types.UnionType) and float in typing.get_args(hint))
    return float(value) if plain_int and accepts_float else value


def _check(ok: bool, flag: str, given: Any, allowed: str) -> None:
    if not ok:
        raise UserError(f"{flag} {given}: must be {allowed}")


def _check_objective(objective: str, held_out: str | None) -> None:
    if "loss" in objective:
        raise UserError(
            f"--objective {objective}: losses of different schedules and T are means over different noise levels and "
            f"do not compare; give one of {', '.join(OBJECTIVES)}"
        )
    _check(objective in OBJECTIVES, "--objective", objective, f"one of {', '.join(OBJECTIVES)}")
    if objective == "bpd" and held_out is None:
        raise UserError("--objective bpd needs --held-out: a data set that was not trained on")


def _check_folder(flag: str, folder: str | None) -> None:
    """Workers run elsewhere, where a relative path means another folder, and take s3:// for no folder at all."""
    if folder is not None and not folder.startswith(("/", "~")):
        raise UserError(f"{flag} {folder}: must be an absolute path on the workers' machines, or begin with ~")


def _check_name(name: str | None) -> None:
    if name is None:
        return
    allowed = name.replace("-", "").replace("_", "").replace(".", "")
    if not (allowed.isalnum() and allowed.isascii() and len(name) <= 200) or name.startswith("."):
        raise UserError(f"--name {name!r}: use letters, digits, '-', '_' and '.', at most 200, not starting with '.'")
