"""The policy `dpp` without one of its terms, for studies: `florilegium.client.selection.ablations:WITHOUT_RECENCY`."""

from functools import partial

from florilegium.client.selection.determinantal import Terms, surprise
from florilegium.client.selection.policies import Policy, dpp

WITHOUT_QUALITY = Policy(partial(dpp, terms=Terms(quality=0)), "likelihood", surprise)
WITHOUT_REDUNDANCY = Policy(partial(dpp, terms=Terms(redundancy=0)), "likelihood", surprise)
WITHOUT_RECENCY = Policy(partial(dpp, terms=Terms(recency=0)), "likelihood", surprise)
