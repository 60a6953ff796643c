"""cIoU (cumulative IoU of masks). The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import SegmentationMetrics, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class CumulativeIoU(hub.MaskMetric):
    """cIoU (cumulative IoU of masks)."""

    accumulator = SegmentationMetrics
    names = ("ciou", "count")
    description = """
Sum of intersections over sum of unions, over all samples.
"""
    citation_text = """
@inproceedings{lai2024lisa,
  title={LISA: Reasoning Segmentation via Large Language Model},
  author={Lai, Xin and Tian, Zhuotao and Chen, Yukang and Li, Yanwei and Yuan, Yuhui and Liu, Shu and Jia, Jiaya},
  booktitle={CVPR},
  year={2024}
}
"""
