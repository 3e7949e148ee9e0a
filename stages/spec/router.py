"""The TRINITY router head, declared: one linear map of a hidden state to the logits of agents and roles.

TRINITY (arXiv 2512.04695) and the original's code: the hidden state is that of the second-to-last token after the
final norm; the head is float32 without bias, agents first, then the roles; each part's argmax decides.
"""

from stages.spec.noise import Noise
from stages.spec.stage import Pipeline, Scope, Stage

# Rows of the head behind the agents', in this order.
ROLES = ("solver", "thinker", "verifier")
HIDDEN_POSITION = -2

ROUTER = Pipeline(
    name="router",
    params=("router_hidden", "router_head"),
    stages=(
        Stage(
            "router_logits",
            params=("router_hidden", "router_head"),
            shape="one outputs",
            noise=Noise.PRODUCT,
            scope=Scope.MODEL,
            doc="Logits of agents and roles: the second-to-last token's final_norm, in float32, times the head",
        ),
    ),
)
