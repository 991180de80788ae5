"""Florilegium: language models that become their users' own, on their users' devices."""

from florilegium.privacy.common.environment import make_absolute

make_absolute()
