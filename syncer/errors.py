"""What can go wrong between here and Supabase; each error answers "did it happen?".

SyncError(message, hint)
├─ SettingsError(setting)     nothing was tried; mend the setting
├─ NotSent                    it did not happen: retry freely
│   ├─ RemoteUnavailable      Supabase can't be reached or says it is down
│   └─ Throttled              asked to wait `retry_after_s`
│       └─ TookTooLong        given up at the statement timeout; less may fit
├─ OutcomeUnknown             it may have happened: resend the same ids
│   ├─ ReplyTimedOut          no reply in time
│   └─ ReplyUnreadable        a reply that is no answer
└─ Refused                    never as it is
    ├─ NotAuthorized          key, role or token; the data are kept
    ├─ ProtocolMismatch       schema, RPC or protocol version differ; the data are kept
    ├─ Declined               an operator's request that no longer applies; nothing was changed
    └─ BatchTooLarge          send less at once

The ledger on the server makes resending harmless, so the flusher treats NotSent and OutcomeUnknown
alike; a reader of a log needs the difference.
"""

from __future__ import annotations


class SyncError(Exception):
    """Base of the errors of the shipping half; `hint` says what helps."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class SettingsError(SyncError):
    """A setting is missing or malformed. The value itself is never repeated."""

    def __init__(self, setting: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{setting}: {reason}", hint=hint)
        self.setting = setting
        self.reason = reason


class NotSent(SyncError):
    """The request had no effect. Retry freely."""


class RemoteUnavailable(NotSent):
    """Supabase can't be asked now: unknown is not absent."""


class Throttled(NotSent):
    """The server asked for a pause of `retry_after_s` seconds (None: it named none)."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class TookTooLong(Throttled):
    """The server gave the call up at its statement timeout. Less at once may fit."""


class OutcomeUnknown(SyncError):
    """The request may have taken effect. Resend the same ids; the ledger recognises them."""


class ReplyTimedOut(OutcomeUnknown):
    """No complete reply within the call's deadline."""


class ReplyUnreadable(OutcomeUnknown):
    """A reply that doesn't answer what was asked: HTML, empty, broken, wrong count, foreign ids."""


class Refused(SyncError):
    """The server won't take this as it is; repeating it unchanged is useless."""


class NotAuthorized(Refused):
    """The key or role isn't accepted. Never a reason to drop data."""


class ProtocolMismatch(Refused):
    """The server lacks the RPC, the schema or the protocol version this code speaks."""


class Declined(Refused):
    """What an operator asked for can't be done any more, for example an edit of what was applied.

    `reason` is the server's word: already_applied, already_discarded, already_resolved, superseded,
    not_parked, no_such_conflict or row_is_gone. Nothing was changed.
    """

    def __init__(self, reason: str, *, hint: str = "") -> None:
        super().__init__(reason.replace("_", " "), hint=hint)
        self.reason = reason


class BatchTooLarge(Refused):
    """The request as a whole is too large or carries one item that spoils the call; send less."""
