"""How requests fared, as the status page tells it."""

from __future__ import annotations

from cluster.frontend.histograms import Histogram, RequestHistograms
from octet.v1 import octet_pb2 as pb


def request_histograms(histograms: RequestHistograms) -> pb.RequestHistograms:
    return pb.RequestHistograms(
        ttft_s=_told(histograms.ttft_s),
        itl_s=_told(histograms.itl_s),
        e2e_s=_told(histograms.e2e_s),
        prompt_tokens=_told(histograms.prompt_tokens),
        new_tokens=_told(histograms.new_tokens),
    )


def _told(histogram: Histogram) -> pb.Histogram:
    return pb.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum)
