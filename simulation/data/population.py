"""From a data set to users: whose replies a simulated device sees, in which order, and which are held out.

A turn that follows another is a reply, and its speaker the user: the turn before is the prompt. In `self_dialogue`
one person writes both sides, so every turn but the first is that person's reply. What is drawn depends on the data,
the config and the seed alone, never on the order of a file's lines, but for replies of the same time, which stand as
they stand in the file. Not covered: which user joins which round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal, Self, overload

import numpy as np
from pydantic import Field, field_validator, model_validator

from florilegium.client.dialogue import Dialogue
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.registry import check, is_extension
from florilegium.privacy.common.suggestions import did_you_mean
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.conversations import READERS, Conversation, read
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import is_file_name
from florilegium.simulation.data.formats.reading import Dates, FieldNames, Reading
from florilegium.simulation.data.formats.reading import Replies as RepliesOf
from florilegium.simulation.data.formats.recognise import read_source
from florilegium.simulation.data.hub import HubFields, read_hub
from florilegium.simulation.data.partition import PartitionConfig, check_labels, rows_by_user
from florilegium.simulation.data.troubles import TroublesConfig, troubled

Half = Literal["development", "test"]
Split = Literal["development", "test", "all"]
Order = Literal["recorded", "iid", "blocked", "sticky"]
HUB = "hub:"


class DataConfig(Config):
    """Which people are simulated."""

    extensible: ClassVar = {"name": ()}  # files and data sets of the hub too

    name: str = Field(default="chitchat", description="a file or a folder, a known name, or hub:owner/dataset")
    users: int = Field(default=64, ge=1, description="devices of as many people, drawn by the seed")
    split: Split = Field(default="test", description="tune on development users, report on test users; all: both")
    bootstrap: bool = Field(default=False, description="more devices than people: theirs, drawn with replacement")
    min_pairs: int = Field(default=40, ge=2, description="users with fewer replies are left out")
    max_pairs: int = Field(default=160, ge=2, description="replies kept of each user: the first ones in time")
    held_out_share: float = Field(default=0.25, gt=0, lt=1, description="last part in time of each user's kept replies")
    queries_per_user: int = Field(default=8, ge=1, description="held-out replies kept: at most the first ones")
    context_turns: int = Field(
        default=1, ge=1, description="turns before a reply in its prompt; long ones lose their beginning"
    )
    partition: PartitionConfig = PartitionConfig()
    order: Order = Field(default="recorded", description="of a stream; sticky: Markov over its domains")
    stickiness: float = Field(default=0.9, ge=0, le=1, description="chance that the next dialogue stays in the domain")
    troubles: TroublesConfig = TroublesConfig()
    hub_fields: HubFields = HubFields()
    fields: FieldNames = FieldNames()
    replies: RepliesOf = Field(default="assistant", description="whose replies are learned, where a file says roles")
    reply_within_s: float = Field(
        default=3600.0, gt=0, description="of a log: what comes later than this after a message does not answer it"
    )
    dates: Dates = Field(
        default="auto", description="of WhatsApp: whether day or month comes first, where a file does not say"
    )

    def extensions(self) -> list[str]:
        return [] if self.name.startswith(HUB) else super().extensions()

    @field_validator("name")
    @classmethod
    def _is_a_source(cls, name: str) -> str:
        if name in READERS or name.startswith(HUB) or is_file_name(name) or Path(name).expanduser().is_dir():
            return name
        if is_extension(name):
            return check(name, READERS, Callable)
        raise ValueError(f"unknown data set {name!r}; {_meant(name)}")

    @model_validator(mode="after")
    def _cap_is_above_the_floor(self) -> Self:
        if self.max_pairs < self.min_pairs:
            raise ValueError(f"max_pairs = {self.max_pairs} must be >= min_pairs = {self.min_pairs}")
        return self

    @model_validator(mode="after")
    def _labels_are_the_domain(self) -> Self:
        by, hub = self.partition.by, self.name.startswith(HUB)
        domain = self.hub_fields.domain if hub else self.fields.domain
        if by and domain not in ("", by):
            where = "hub_fields" if hub else "fields"
            raise ValueError(f"partition.by = {by!r} is what is read as the domain; leave out {where}.domain")
        if by not in ("", "domain") and not hub and self.is_known():
            raise ValueError(f"partition.by = {by!r}: {self.name} has no columns, only domains; leave partition.by out")
        return self

    def is_known(self) -> bool:
        """Whether a reader of ours, or of the user's, is meant: an existing file wins."""
        return (self.name in READERS or is_extension(self.name)) and not Path(self.name).expanduser().is_file()


@dataclass(frozen=True)
class User:
    """A person: the replies that the device meets in time order, and later ones that it never meets."""

    id: str
    stream: tuple[Dialogue, ...]
    held_out: tuple[Dialogue, ...]


@dataclass(frozen=True)
class Replies:
    """All replies of a data set by user, in time order, and how many were left out as empty, broken or recorded twice.

    Where the data knows no users, all of them stand under the user "".
    """

    by_user: dict[str, tuple[Dialogue, ...]]
    anonymous: bool
    empty: int
    repeated: int
    silent: int = 0  # users all of whose replies were left out as empty or broken
    broken: int = 0  # with half a character, which JSON can name and nothing can write


def load_population(config: DataConfig, seed: int) -> Sequence[User]:
    """`config.users` users of one half of a data set, drawn by the seed, each with a stream and held-out replies.

    The halves are disjoint whatever the seed. Every device of an anonymous data set is a random hand of replies.
    Where users are too few, `bootstrap` adds resampled ones; without it `DataError` tells the number there is.
    """
    reading = reading_of(config)
    found = draw(collect(config, reading), config, seed)
    told = (reading.told(), *reading.problems()) if reading.read_as else ()
    return replace(found, told=told) if isinstance(found, Bootstrapped) else Drawn(found, told)


def collect(config: DataConfig, reading: Reading | None = None, named: str = "") -> Replies:
    """Reads the whole data set; `reading` is told what a file was taken for and what was left out of it.

    A reply with the same user, time, prompt and response as another counts once; without times, one with the same user,
    prompt and response does.
    """
    found: dict[str, list[Dialogue]] = {}
    seen: set[tuple[str, float, str, str]] = set()
    silent: set[str] = set()
    empty = repeated = broken = 0
    anonymous = False
    reading = reading or reading_of(config)
    for conversation in _conversations(config, reading, named):
        anonymous = conversation.replies_by == ""
        for user, reply in _replies(conversation, config.context_turns):
            record = (user, reply.time, reply.prompt, reply.response)
            if not reply.prompt or not reply.response:
                empty += 1
                silent.add(user)
                _leave_out("line without prompt or response", conversation, reading)
            elif not all(map(is_whole, (user, reply.prompt, reply.response, reply.domain))):
                broken += 1
                silent.add(user)
                _leave_out("line with half a character", conversation, reading)
            elif record in seen:
                repeated += 1
                _leave_out("line recorded before", conversation, reading)
            else:
                seen.add(record)
                found.setdefault(user, []).append(reply)
    in_order = {user: _in_order(found[user]) for user in sorted(found)}
    return Replies(in_order, anonymous, empty, repeated, len(silent - found.keys()), broken)


def _leave_out(reason: str, conversation: Conversation, reading: Reading) -> None:
    """Notes the line of a file of ours, whose conversations are called after their lines; others note their rows."""
    if reading.by_line:
        source, _, number = conversation.id.rpartition(":")
        reading.leave_out(reason, f"{source}, line {number}")


def is_whole(text: str) -> bool:
    """Whether each of its characters can be written: JSON can name halves of them, as \\ud83d."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def streams(replies: Replies, config: DataConfig, seed: int) -> dict[str, tuple[Dialogue, ...]]:
    """What each eligible user of the split has said, capped: `min_pairs <= len(stream) <= max_pairs`."""
    everybody = users_of(replies, config, seed)
    return {user: said[: config.max_pairs] for user, said in everybody.items() if len(said) >= config.min_pairs}


def users_of(replies: Replies, config: DataConfig, seed: int) -> dict[str, tuple[Dialogue, ...]]:
    """All that each user of the split has said, however little: recorded users, or those whom it is dealt to.

    Raises `DataError` for data that has users and is to be parted among others.
    """
    kind = config.partition.kind
    if kind not in ("", "natural") and not replies.anonymous:
        raise DataError(
            f"data.partition.kind = {kind!r} is for data that names no users, and {config.name} has "
            f"{len(replies.by_user):,}; leave it out, or use 'natural'"
        )
    if replies.anonymous and kind != "natural":
        return _deal(replies.by_user.get("", ()), config, seed)
    by_user = replies.by_user
    if replies.anonymous or config.partition.by:
        by_user = _by_label(by_user, config)
    return {user: said for user, said in by_user.items() if config.split in (half_of(user), "all")}


def draw(replies: Replies, config: DataConfig, seed: int) -> Sequence[User]:
    """The users with the lowest keyed hashes: a draw of k users is the start of every longer one."""
    eligible = streams(replies, config, seed)
    if len(eligible) < config.users and not (config.bootstrap and eligible):
        raise DataError(_too_few(replies, config, len(eligible)))
    chosen = sorted(eligible, key=lambda user: derive_seed(seed, "draw", user))[: config.users]
    people = [_user(user, eligible[user], config, seed) for user in chosen]
    if config.troubles.share:
        people = [_troubled(user, eligible, config, seed) for user in people]
    return people if len(people) == config.users else Bootstrapped(people, config.users, seed)


class Drawn(list[User]):
    """Users, and what is to be told of how the data was read that they are drawn from."""

    def __init__(self, users: Iterable[User], told: Sequence[str]) -> None:
        super().__init__(users)
        self.told = tuple(told)


def told_of(population: Sequence[User]) -> tuple[str, ...]:
    """What a file was taken for, and what was left out of it: lines for people; () of what was not read just now."""
    return population.told if isinstance(population, Drawn | Bootstrapped) else ()


@dataclass(frozen=True)
class Bootstrapped(Sequence[User]):
    """People, and behind them devices whose streams are drawn, with replacement, from the stream of one of them.

    Such a device is not another person: it has the same held-out replies, and its dialogues are known ones. Last come
    people who stand `apart`: nothing of theirs is on any other device.
    """

    people: Sequence[User]
    devices: int
    seed: int
    apart: Sequence[User] = ()
    told: tuple[str, ...] = ()  # of how the data was read

    def __len__(self) -> int:
        return self.devices + len(self.apart)

    def with_apart(self, count: int) -> Bootstrapped:
        """As many devices in all, the last so many of them people whom no device is resampled from."""
        if count >= len(self.people):
            raise DataError(f"{count} newcomers leave none of {len(self.people)} people to resample; lower newcomers")
        people, apart = self.people[: len(self.people) - count], self.people[len(self.people) - count :]
        return Bootstrapped(people, self.devices - count, self.seed, apart, self.told)

    @overload
    def __getitem__(self, index: int) -> User: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[User]: ...

    def __getitem__(self, index: int | slice) -> User | Sequence[User]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index >= self.devices:
            return self.apart[index - self.devices]
        copy, person = divmod(index, len(self.people))
        return resampled(self.people[person], copy, self.seed) if copy else self.people[person]


def resampled(user: User, copy: int, seed: int) -> User:
    """As many dialogues as the user's stream has, drawn from it with replacement, in its order."""
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "bootstrap", user.id, copy)))
    drawn = sorted(rng.integers(len(user.stream), size=len(user.stream)).tolist())
    stream = tuple(replace(user.stream[i], id=f"{user.stream[i].id}~{copy}.{n}") for n, i in enumerate(drawn))
    return User(f"{user.id}~{copy}", stream, user.held_out)


def met_by(length: int, number: int, rounds: int) -> int:
    """How much of a stream a device has met by the end of round `number`: equal parts in each."""
    return round(length * number / rounds)


def arrange(stream: Sequence[Dialogue], order: Order, stickiness: float, seed: int) -> tuple[Dialogue, ...]:
    """The same dialogues in another temporal correlation of their domains; within a domain their order is random.

    `iid` shuffles. `blocked` has one domain after the other. `sticky` stays in a domain with probability
    `stickiness` while it has dialogues left, and else goes to that of a random remaining one. Raises `DataError`
    for `blocked` and `sticky` where all dialogues have the same domain.
    """
    if order == "recorded":
        return tuple(stream)
    rng = np.random.Generator(np.random.Philox(key=seed))
    shuffled = [stream[i] for i in rng.permutation(len(stream))]
    if order == "iid":
        return tuple(shuffled)
    left: dict[str, list[Dialogue]] = {}
    for dialogue in shuffled:
        left.setdefault(dialogue.domain, []).append(dialogue)
    if len(left) < 2 <= len(stream):
        raise DataError(f"data.order = {order!r} needs dialogues of several domains; a user's are all of one")
    stay = 1.0 if order == "blocked" else stickiness
    domain, arranged = "", list[Dialogue]()
    while left:
        if domain not in left or rng.random() >= stay:
            domain = str(rng.choice([name for name, rest in left.items() for _ in rest]))
        arranged.append(left[domain].pop())
        if not left[domain]:
            del left[domain]
    return tuple(arranged)


def half_of(identity: str) -> Half:
    """The half that a user, or an anonymous conversation, belongs to for ever: the parity of a hash."""
    return "development" if sha256(f"half:{identity}".encode()).digest()[0] % 2 == 0 else "test"


def _meant(name: str) -> str:
    """What somebody may have meant by a name that is none."""
    path, ways = Path(name).expanduser(), "name a file or a folder, or hub:owner/dataset"
    if path.suffix or "/" in name:
        return f"there is no such file; {ways}"
    near = did_you_mean(name.lower(), READERS)
    return f"{near} Else {ways}" if near else f"known names: {', '.join(READERS)}; else {ways}"


def reading_of(config: DataConfig) -> Reading:
    """How the settings say that a file is to be read; labels that it is parted by are read as domains."""
    fields, by = config.fields, config.partition.by
    if by and not config.is_known():
        fields = fields.model_copy(update={"domain": by})
    return Reading(fields, config.replies, config.reply_within_s, config.dates, labelled=bool(by))


def _conversations(config: DataConfig, reading: Reading, named: str) -> Iterator[Conversation]:
    path = Path(config.name).expanduser()
    if path.is_file():
        return read_source(path, reading, named)
    if config.name.startswith(HUB):
        return read_hub(config.name.removeprefix(HUB), config.hub_fields, reading)
    if config.name in READERS or is_extension(config.name):
        reading.take_for(f"the data set {config.name}")
        reading.check_replies()
        reading.read_as = ""  # its own description says more
        return read(config.name)
    return read_source(path, reading, named)


def _replies(conversation: Conversation, context_turns: int) -> Iterator[tuple[str, Dialogue]]:
    """Each reply of somebody who counts as a user, with that user; a nameless speaker among named ones does not."""
    wanted, turns = conversation.replies_by, conversation.turns
    for i, reply in enumerate(turns[1:], start=1):
        if reply.speaker == wanted or (wanted is None and reply.speaker):
            identity = f"{conversation.id}:{i}"
            said = "\n".join(turn.text.strip() for turn in turns[max(0, i - context_turns) : i])
            prompt, response = said.strip(), reply.text.strip()
            yield reply.speaker, Dialogue(identity, prompt, response, reply.time, conversation.domain)


def _in_order(said: list[Dialogue]) -> tuple[Dialogue, ...]:
    """By time, those of the same time as they were read; running numbers stand for times where there are none."""
    if any(reply.time for reply in said):
        return tuple(sorted(said, key=lambda reply: reply.time))
    return tuple(replace(reply, time=float(n)) for n, reply in enumerate(said))


def _deal(replies: tuple[Dialogue, ...], config: DataConfig, seed: int) -> dict[str, tuple[Dialogue, ...]]:
    """Shuffled conversations, dealt out as data.partition says, else in equal runs; each lies in one half.

    Replies of one conversation follow each other, so that in equal runs its context is not met before or after on
    another device (but for the one that a run ends in). Times become running numbers.
    """
    half = [reply for reply in replies if config.split in (half_of(_conversation_of(reply)), "all")]
    drawn_by = seed if config.partition.seed == "run" else config.partition.seed
    shuffled = sorted(half, key=lambda reply: derive_seed(drawn_by, "deal", _conversation_of(reply)))
    devices = min(config.users, len(half) // config.min_pairs)
    if config.partition.kind:
        users, labels = config.partition.users or config.users, [reply.domain for reply in shuffled]
        of_user = rows_by_user(labels, config.partition, users, config.min_pairs, derive_seed(drawn_by, "partition"))
        hands = [[shuffled[row] for row in rows] for rows in of_user]
    else:
        hands = [shuffled[i * len(half) // devices : (i + 1) * len(half) // devices] for i in range(devices)]
    return {
        f"{config.split}-{i:05d}": tuple(replace(reply, time=float(n)) for n, reply in enumerate(hand))
        for i, hand in enumerate(hands)
    }


def _by_label(by_user: dict[str, tuple[Dialogue, ...]], config: DataConfig) -> dict[str, tuple[Dialogue, ...]]:
    """A user for each label, which is the domain of what was said."""
    found: dict[str, list[Dialogue]] = {}
    for reply in (reply for said in by_user.values() for reply in said):
        found.setdefault(reply.domain, []).append(reply)
    check_labels([reply.domain for said in found.values() for reply in said], config.partition)
    return {label: _in_order(found[label]) for label in sorted(found)}


def cut(said: tuple[Dialogue, ...], config: DataConfig) -> tuple[tuple[Dialogue, ...], tuple[Dialogue, ...]]:
    """What was said up to a point in time, and the first `queries_per_user` replies after it; one at least of each."""
    held_out = min(len(said) - 1, max(1, round(config.held_out_share * len(said))))
    at = len(said) - held_out
    return said[:at], said[at : at + config.queries_per_user]


def met_before(stream: Sequence[Dialogue], held_out: Sequence[Dialogue]) -> int:
    """How many of the held-out replies stand in the stream too, prompt and response word for word."""
    met = {(dialogue.prompt, dialogue.response) for dialogue in stream}
    return sum((dialogue.prompt, dialogue.response) in met for dialogue in held_out)


def _user(identity: str, said: tuple[Dialogue, ...], config: DataConfig, seed: int) -> User:
    if len({reply.id for reply in said}) < len(said):
        raise DataError(f"user {identity} of {config.name} has two replies with the same id")
    stream, held_out = cut(said, config)
    arranged = arrange(stream, config.order, config.stickiness, derive_seed(seed, "order", identity))
    return User(identity, arranged, held_out)


def _troubled(user: User, eligible: Mapping[str, tuple[Dialogue, ...]], config: DataConfig, seed: int) -> User:
    """The user with a troubled stream. What others have said is all that any of the half meets, held out nowhere."""
    others = [cut(said, config)[0] for name, said in eligible.items() if name != user.id]
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "troubles", config.troubles.kind, user.id)))
    return replace(user, stream=troubled(user.stream, others, config.troubles, rng))


def _too_few(replies: Replies, config: DataConfig, eligible: int) -> str:
    asked = f"data.users = {config.users}, but the {config.split} half of {config.name!r} has"
    remedy = f"set users <= {eligible}, lower min_pairs" if eligible else "lower min_pairs"
    if kind := config.partition.kind:
        had = f"{eligible} users with min_pairs = {config.min_pairs} replies or more after its partition ({kind})"
        return f"{asked} {had}; {remedy}"
    if replies.anonymous:
        return f"{asked} replies for {eligible} devices of min_pairs = {config.min_pairs}; {remedy}"
    return (
        f"{asked} {eligible} users with min_pairs = {config.min_pairs} replies or more; {remedy}, "
        f"take a larger data set ({len(replies.by_user)} users in both halves), or set bootstrap=true"
    )


def _conversation_of(reply: Dialogue) -> str:
    return reply.id.rpartition(":")[0]
