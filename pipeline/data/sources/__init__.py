"""Where images come from: one file for each kind of source, and ``open_source``, which knows them all."""

from pipeline.data.sources.archive import ArchiveSource
from pipeline.data.sources.arrays import ArraySource
from pipeline.data.sources.base import Sample, Source, sample_key
from pipeline.data.sources.cifar10 import Cifar10Source
from pipeline.data.sources.digits import DigitsSource
from pipeline.data.sources.folder import FolderSource
from pipeline.data.sources.opening import SOURCE_SPECS, open_source
from pipeline.data.sources.pixels import IMAGE_EXTENSIONS, MAX_PIXELS, fit_image

__all__ = ["IMAGE_EXTENSIONS", "MAX_PIXELS", "SOURCE_SPECS", "ArchiveSource", "ArraySource", "Cifar10Source"]
__all__ += ["DigitsSource", "FolderSource", "Sample", "Source", "fit_image", "open_source", "sample_key"]
