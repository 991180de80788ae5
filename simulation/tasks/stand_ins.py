"""The types of benchmarks' tasks, and slot filling, made from populations that are here. None is a benchmark's.

Each has the name of what it is. Users are real people with their times where the data knows them; where it does not,
they are dealt (`simulation.tasks.populations.dealt`) and their taste is synthetic: such a task can show that a method
finds what a user likes, not that people differ so. `nano` was trained on self_dialogue, ubuntu_irc and sgd: what is
made of these is `seen_by_nano`, and only another model may be measured on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from florilegium.client.dialogue import Dialogue
from florilegium.privacy.common.registry import UnexpectedError, calling, resolve
from florilegium.simulation.data.population import DataConfig, User
from florilegium.simulation.tasks import populations
from florilegium.simulation.tasks.makers import Split, as_recorded, by_length, of_options
from florilegium.simulation.tasks.populations import TOPICS, conversation, dealt, once, people
from florilegium.simulation.tasks.task import Task, TaskUser, as_patterns, by_a_person

FEELINGS = (
    "afraid, angry, annoyed, anticipating, anxious, apprehensive, ashamed, caring, confident, content, devastated, "
    "disappointed, disgusted, embarrassed, excited, faithful, furious, grateful, guilty, hopeful, impressed, jealous, "
    "joyful, lonely, nostalgic, prepared, proud, sad, sentimental, surprised, terrified, trusting"
)
EMOTIONS = tuple(FEELINGS.split(", "))
TOPIC_LABELS = tuple(sorted(set(TOPICS.values())))
ROUGE = ("rouge-1", "rouge-L")
NANO_WAS_TRAINED_ON = {"self_dialogue", "ubuntu_irc", "sgd", "topicalchat"}
Load = Callable[[DataConfig, int], list[User]]  # people drawn by the seed
Make = Callable[[Task, list[User], list[User], int], Split]  # of the pool, those who are reported on, and the seed


@dataclass(frozen=True)
class StandIn:
    """A task, the type of LaMP's or the benchmark that it resembles, its data set, and whose texts become its items."""

    task: Task
    kind: str
    about: str
    source: str
    load: Load
    make: Make
    real_users: bool

    @property
    def seen_by_nano(self) -> bool:
        """Whether `nano` was trained on the texts: then it must not be measured on them."""
        return self.source in NANO_WAS_TRAINED_ON


def load_stand_in(name: str, users: int, data: DataConfig, seed: int) -> Split:
    """The pool and `users` people apart from it, `data.users` in all.

    A conversation that one of the users took part in is taken from the pool: what they replied there stands as
    others' prompts. (Who in the pool has nothing left is left out.)
    """
    made = stand_in(name)
    with calling(name, "load users, as `StandIn.load` says"):
        drawn = made.load(data.model_copy(update={"name": made.source}), seed)
        if not all(isinstance(user, User) for user in drawn):
            raise UnexpectedError("loaded what is no list of users")
    chosen, rest = drawn[:users], drawn[users:]
    theirs = {conversation(card) for user in chosen for card in (*user.stream, *user.held_out)}
    pool = [_without(user, theirs) for user in rest]
    with calling(name, "make the pool and the users, as `StandIn.make` says"):
        split = made.make(made.task, [user for user in pool if user.stream and user.held_out], chosen, seed)
        if [type(user) for part in split for user in part] != [TaskUser] * sum(map(len, split)) or len(split) != 2:
            raise UnexpectedError("made what are no two lists of TaskUsers")
    return split


def stand_in(name: str) -> StandIn:
    """The stand-in of this name, or one of the user's own."""
    return resolve(name, STAND_INS, StandIn)


def _without(user: User, conversations: set[str]) -> User:
    parts = (user.stream, user.held_out)
    return User(user.id, *(tuple(c for c in part if conversation(c) not in conversations) for part in parts))


def _of_people(by_user: Callable[[DataConfig], populations.People], unique: str) -> Load:
    return lambda data, seed: people(by_user(data), data, seed, unique=unique)


def _of_cards(cards: Callable[[], Iterable[Dialogue]], unique: str) -> Load:
    def load(data: DataConfig, seed: int) -> list[User]:
        in_order = sorted(cards(), key=lambda card: card.id)  # whatever the order of the file
        hands, everybody = dealt(once(in_order, unique), data, seed)
        return people(hands, everybody, seed, unique=unique)

    return load


def _reply_task(name: str) -> Task:
    shown_as = '"{target}" was the answer to "{text}" '
    return Task(name, ROUGE, asked="{text}", shown_as=shown_as, joined=by_a_person, own="{target}")


def _name_one(what: str, labels: tuple[str, ...], of: str) -> str:
    return f"Which {what} does this {of} relate to? Just answer with one of: {', '.join(labels)}. {of}: {{text}}"


STAND_INS = {
    stand_in.task.name: stand_in
    for stand_in in (
        StandIn(
            Task(
                "which-reply",
                ("accuracy", "f1"),
                ("[1]", "[2]"),
                asked='To "{title}", which reply did the user write? Just answer with [1] or [2]. {text}',
                practice=("{title}", "{text}"),
                joined=by_a_person,
                searched_with="{title}",
            ),
            "1",
            "which of two replies to a prompt the user wrote; the other is somebody else's to a prompt of its kind",
            "chitchat",
            _of_people(populations.replies, "response"),
            of_options,
            real_users=True,
        ),
        StandIn(
            Task(
                "which-of-4",
                ("choice accuracy",),
                ("(a)", "(b)", "(c)", "(d)"),
                asked='To "{title}", which reply did the user write? Just answer with (a), (b), (c) or (d). {text}',
                practice=("{title}", "{text}"),
                joined=by_a_person,
                searched_with="{title}",
            ),
            "PersonaMem",
            "which of four replies to a prompt the user wrote; the others are other people's to prompts of its kind",
            "chitchat",
            _of_people(populations.replies, "response"),
            of_options,
            real_users=True,
        ),
        StandIn(
            Task(
                "talk-topic",
                ("accuracy", "f1"),
                TOPIC_LABELS,
                asked=_name_one("topic", TOPIC_LABELS, "talk"),
                shown_as='the topic of the talk: "{text}" is "{target}" ',
            ),
            "2N",
            "the topic of a talk that the user wrote, from its beginning",
            "self_dialogue",
            _of_people(populations.talks, "prompt"),
            as_recorded,
            real_users=True,
        ),
        StandIn(
            Task(
                "feeling",
                ("accuracy", "f1"),
                EMOTIONS,
                asked=_name_one("feeling", EMOTIONS, "text"),
                shown_as='the feeling of the text: "{text}" is "{target}" ',
            ),
            "2M",
            "the emotion that somebody tells of, of 32",
            "empathetic",
            _of_cards(populations.feelings, "prompt"),
            as_recorded,
            real_users=False,
        ),
        StandIn(
            Task(
                "reply-length",
                ("mae", "rmse"),
                ("1", "2", "3", "4", "5"),
                asked="How long is the user's reply on a scale of 1 to 5? Just answer with 1, 2, 3, 4, or 5. "
                "prompt: {text}",
                shown_as='{target} is the length of the reply to "{text}" ',
            ),
            "3",
            "the fifth that the length of the user's reply to a prompt is in; cuts are the pool's",
            "chitchat",
            _of_people(populations.replies, "prompt"),
            by_length,
            real_users=True,
        ),
        StandIn(
            Task(
                "instruction",
                ROUGE,
                asked="Write the instruction that the following text answers: {text}",
                shown_as='"{target}" is the instruction for "{text}" ',
                searched="{target} {text}",
            ),
            "4",
            "the instruction that an answer was written for",
            "dolly",
            _of_cards(populations.instructions, "response"),
            as_recorded,
            real_users=False,
        ),
        StandIn(
            Task(
                "situation",
                ROUGE,
                asked="Write in one sentence the situation of the speaker in the following dialogue: {text}",
                shown_as='"{target}" is the situation of "{text}" ',
                joined=as_patterns,
                searched="{target} {text}",
            ),
            "5",
            "the sentence for the situation that a dialogue is about",
            "empathetic",
            _of_cards(populations.situations, "response"),
            as_recorded,
            real_users=False,
        ),
        StandIn(
            Task(
                "talk-rest",
                ROUGE,
                asked="Write the rest of the talk that begins so: {text}",
                shown_as='"{target}" is the rest of the talk that begins with "{text}" ',
                joined=as_patterns,
                searched="{text} {target}",
                own="{target}",
            ),
            "LongLaMP",
            "the rest of a talk, of 40 to 128 words, from how it begins",
            "self_dialogue",
            _of_people(populations.long_talks, "response"),
            as_recorded,
            real_users=True,
        ),
        StandIn(
            _reply_task("chat-reply"),
            "7",
            "what the user replied in a chat",
            "chitchat",
            _of_people(populations.replies, "response"),
            as_recorded,
            real_users=True,
        ),
        StandIn(
            _reply_task("help-reply"),
            "7",
            "what the user replied in a help channel",
            "ubuntu_irc",
            _of_people(populations.replies, "response"),
            as_recorded,
            real_users=True,
        ),
        StandIn(
            Task(
                "slots",
                ("slot accuracy",),
                asked="{text}",
                shown_as='"{text}" has the answer "{target}" ',
            ),
            "slots",
            "a slot's value, from a task dialogue up to its confirmation",
            "sgd",
            _of_cards(populations.slots, "prompt"),
            as_recorded,
            real_users=False,
        ),
    )
}
