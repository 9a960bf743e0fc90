"""The papers' methods, one file each: which losses, on which features, and whose gradients stop where."""

from kdkernels.methods.atsc import ATSC
from kdkernels.methods.connectors import Bottleneck, Conv, Linear
from kdkernels.methods.ctkd import CTKD
from kdkernels.methods.deployable import Cost, Deployable, load_deployable
from kdkernels.methods.dgkd import DGKD
from kdkernels.methods.dkd import DKD
from kdkernels.methods.ijckd import IJCKD
from kdkernels.methods.kd import KD
from kdkernels.methods.kd2m import KD2M, METRICS
from kdkernels.methods.lskd import LSKD
from kdkernels.methods.maskd import MasKD
from kdkernels.methods.method import Method, Output
from kdkernels.methods.mgd import MGD
from kdkernels.methods.network import Seen
from kdkernels.methods.nkd import NKD
from kdkernels.methods.rco import RCO
from kdkernels.methods.simkd import SimKD
from kdkernels.methods.srrl import SRRL
from kdkernels.methods.takd import TAKD, Hop, chain

#: Every method by its name on the command line.
METHODS: dict[str, type[Method]] = {
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "lskd": LSKD,
    "ctkd": CTKD,
    "rco": RCO,
    "takd": TAKD,
    "dgkd": DGKD,
    "maskd": MasKD,
    "mgd": MGD,
    "kd2m": KD2M,
    "srrl": SRRL,
    "simkd": SimKD,
    "ijckd": IJCKD,
    "atsc": ATSC,
}

__all__ = [
    "ATSC",
    "CTKD",
    "DGKD",
    "DKD",
    "IJCKD",
    "KD",
    "KD2M",
    "LSKD",
    "METHODS",
    "METRICS",
    "MGD",
    "NKD",
    "RCO",
    "SRRL",
    "TAKD",
    "Bottleneck",
    "Conv",
    "Cost",
    "Deployable",
    "Hop",
    "Linear",
    "MasKD",
    "Method",
    "Output",
    "Seen",
    "SimKD",
    "chain",
    "load_deployable",
]
