"""The folder of a real device: its settings, its encrypted file, the key to it."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from types import ModuleType
from typing import TYPE_CHECKING

import tomli_w
from filelock import FileLock, Timeout

from florilegium.client.agent.errors import HomeError
from florilegium.privacy.common.database import KEY_HEX

if TYPE_CHECKING:
    from florilegium.client.agent.config import AgentConfig

LONGEST_SOCKET = 100  # bytes of a Unix socket's path that every system takes
USUAL = Path("~/.florilegium")
KEYRING = "florilegium"
LOCK = "agent.lock"
OWN = ("device.*", "key", "ledger.head*", "agent.sock")  # files that a device makes in its folder


class DeviceFolder:
    """The files of one device, for its owner alone."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()

    def command(self, name: str) -> str:
        """How its owner calls a command of this device."""
        return f"florilegium device {name}" + ("" if self.path == USUAL.expanduser() else f" --home {self.path}")

    @property
    def vault(self) -> Path:
        """Everything that the device knows, encrypted."""
        return self.path / "device.db"

    @property
    def good_copy(self) -> Path:
        """The vault as it was when it was last found whole."""
        return self.path / "device.good.db"

    def set_aside(self) -> None:
        """Moves a vault that is damaged away, with what SQLite left beside it; never over an older one."""
        number = next(n for n in count(1) if not (self.path / f"device.damaged-{n}.db").exists())
        aside = self.path / f"device.damaged-{number}.db"
        for old, new in ((with_journal(self.vault), with_journal(aside)), (self.vault, aside)):
            if old.exists():
                old.replace(new)
        sync_folder(self.path)

    def drop_copies(self) -> None:
        """Deletes the good copy and vaults that were set aside: they may hold what is being erased."""
        for path in (self.good_copy, *self.path.glob("device.damaged-*")):
            path.unlink(missing_ok=True)
        sync_folder(self.path)

    @property
    def spent(self) -> Path:
        """The ledger's newest head: what a vault from before lacks."""
        return self.path / "ledger.head"

    @property
    def socket(self) -> Path:
        """Where the agent listens; raises `HomeError` for a path that is too long for one."""
        path = self.path / "agent.sock"
        if len(os.fsencode(path)) > LONGEST_SOCKET:
            raise HomeError(f"{path} is longer than the {LONGEST_SOCKET} bytes of a socket's path; take another --home")
        return path

    @property
    def supernode(self) -> Path:
        """Where the SuperNode keeps its key and certificates."""
        return self.path / "courier"

    @property
    def settings(self) -> Path:
        """What its owner has set, in TOML."""
        return self.path / "device.toml"

    @property
    def _key_file(self) -> Path:
        return self.path / "key"

    @property
    def exists(self) -> bool:
        """Whether there is a device."""
        return self.settings.exists()

    def check(self) -> AgentConfig:
        """The settings of a device that is there and whole; raises `HomeError`. A keyring is not asked."""
        config = self.config()
        if config.key == "file":
            self.read_key(config)
        if not self.vault.exists():
            raise HomeError(f"{self.vault} is missing: {self.command('restore')}, or erase and init")
        return config

    def config(self) -> AgentConfig:
        """Raises `HomeError` for settings that are missing or wrong."""
        from florilegium.client.agent.config import AgentConfig  # with it those that account for privacy

        self._check_owner()
        try:
            return AgentConfig.model_validate(tomllib.loads(self.settings.read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            raise HomeError(f"there is no device in {self.path}: {self.command('init')}") from None
        except ValueError as error:
            raise HomeError(f"{self.settings}: {error}") from None

    def check_copy(self) -> AgentConfig:
        """The settings of a device that has a good copy to go back to; raises `HomeError`."""
        config = self.config()
        if not self.good_copy.exists():
            raise HomeError(f"there is no copy: {self.good_copy} is missing")
        return config

    def write_config(self, config: AgentConfig) -> None:
        """Replaces the settings, whole or not at all."""
        written = tomli_w.dumps(_without_none(config.model_dump(mode="json")))
        replace_file(self.settings, f"# Settings of this device. Its dialogues are in {self.vault.name}.\n{written}")

    def check_empty(self) -> None:
        """Raises `HomeError` where there is a device already, or anything else."""
        if self.exists:
            raise HomeError(f"{self.path} holds a device already; take another --home, or erase it")
        if self.path.exists() and not self.path.is_dir():
            raise HomeError(f"{self.path} is not a folder; take another --home")
        if self.path.exists() and {path.name for path in self.path.iterdir()} - {LOCK}:
            raise HomeError(f"{self.path} is not empty; take another --home")

    def make(self, config: AgentConfig) -> str:
        """A new folder for its owner alone, with a new key, which is returned. Raises `HomeError` if there is one."""
        self.check_empty()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.chmod(0o700)
        except OSError as error:
            raise HomeError(f"{self.path} cannot be made: {error.strerror}; take another --home") from None
        key = token_hex(KEY_HEX // 2)
        if config.key == "keyring":
            with _keyring() as ring:
                ring.set_password(KEYRING, config.name, key)
        else:
            write_private(self._key_file, key.encode())
        self.write_config(config)
        return key

    def read_key(self, config: AgentConfig) -> str:
        """The key of the vault. Raises `HomeError` where it is missing or others may read it."""
        if config.key == "keyring":
            with _keyring() as ring:
                key = ring.get_password(KEYRING, config.name)
            if not key:
                raise HomeError(f"the keyring has no key for {config.name}: unlock it, or restore the entry")
            return str(key)
        try:
            mode = self._key_file.stat().st_mode
        except FileNotFoundError:
            raise HomeError(
                f"{self._key_file} is missing: put it back from your backup; without it nothing is readable"
            ) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise HomeError(f"others may read {self._key_file}: chmod 600 {self._key_file}")
        return self._key_file.read_text(encoding="utf-8").strip()

    def erase(self) -> None:
        """Destroys the key first: what a disk still holds of the vault cannot be read any more."""
        if self._key_file.exists():
            with open(self._key_file, "r+b") as file:
                file.write(b"0" * KEY_HEX)
                file.flush()
                os.fsync(file.fileno())
        elif (config := self.config()).key == "keyring":
            with _keyring() as ring:
                ring.delete_password(KEYRING, config.name)
        rmtree(self.supernode, ignore_errors=True)
        for pattern in OWN:
            for path in self.path.glob(pattern):
                path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The lock of one agent at a time; raises `HomeError` while another has it."""
        self._check_owner()
        try:
            with FileLock(self.path / LOCK, timeout=0):
                yield
        except Timeout:
            raise HomeError(
                f"an agent is running on {self.path} already: stop `florilegium device serve` first"
            ) from None

    def _check_owner(self) -> None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise HomeError(f"there is no device in {self.path}: {self.command('init')}") from None
        if found.st_uid != os.getuid():
            raise HomeError(f"{self.path} belongs to somebody else")
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise HomeError(f"others may look into {self.path}: chmod 700 {self.path}")


def write_private(path: Path, content: bytes) -> None:
    """A new file that its owner alone can read. Raises FileExistsError."""
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """The file with this text, or as it was, whenever the power fails."""
    beside = path.with_name(f"{path.name}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What was renamed or deleted in it stays so, whenever the power fails."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def with_journal(path: Path) -> Path:
    """Where SQLite keeps what a transaction has overwritten."""
    return path.with_name(f"{path.name}-journal")


@contextmanager
def _keyring() -> Iterator[ModuleType]:
    """The system's keyring; raises `HomeError` where there is none, or where it fails."""
    try:
        import keyring
    except ImportError:
        raise HomeError("the keyring needs the extra `device`; or take --key file") from None
    try:
        yield keyring
    except keyring.errors.KeyringError as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HomeError(f"the system's keyring failed ({told}); unlock it, or take --key file") from None


def _without_none(tree: dict[str, object]) -> dict[str, object]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in tree.items() if v is not None}
