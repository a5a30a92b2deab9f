"""Every error a user can meet.

Each says what is wrong, where (file, key path, tensor, token), and what to do. The command line turns
`exit_code` into the process's status; the server turns `status` and `code` into an OpenAI-shaped error body.
"""

from __future__ import annotations


class GnomonError(Exception):
    """Base of all errors meant for a user's eyes.

    message: what is wrong and where. hint: what to do about it. param: the request field or recipe key path at fault.
    """

    exit_code = 1
    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class UsageError(GnomonError):
    """An option, argument or key is wrong (command line exit code 2, HTTP 400)."""

    exit_code = 2
    status = 400
    code = "invalid_value"


class UnknownOption(UsageError):
    """A key, field or flag that nobody claims; the message names the nearest known one."""

    code = "unknown_parameter"


class NotAllowedInRequest(UsageError):
    """An option that only the operator may set came in a request (files, code, models, URLs)."""

    code = "operator_only"


class Conflict(UsageError):
    """Two capabilities that cannot work together; the message gives the reason."""

    code = "conflict"


class PromptError(UsageError):
    """The prompt itself is unusable: empty, not text, or outside the vocabulary."""

    code = "invalid_prompt"


class ContextLengthExceeded(UsageError):
    """The prompt is longer than the model's context, or than the operator's limit."""

    code = "context_length_exceeded"


class ChatTemplateError(UsageError):
    """No chat template, or the template refused these messages."""

    code = "chat_template"


class ConfigError(UsageError):
    """A recipe or configuration file is wrong; `param` is the key path."""

    code = "invalid_config"


class GrammarError(UsageError):
    """A grammar, schema or pattern that is wrong or cannot be enforced; the message says where."""

    code = "invalid_grammar"


class ModelNotFound(GnomonError):
    """A model reference that leads nowhere (HTTP 404)."""

    status = 404
    code = "model_not_found"


class UnsupportedModel(GnomonError):
    """The network, tensor type or tokenizer of this model is not one that gnomon runs."""

    status = 400
    code = "unsupported_model"


class CheckpointError(GnomonError):
    """A model file is truncated, damaged, unsafe or inconsistent."""

    code = "bad_checkpoint"


class PatchError(GnomonError):
    """A patch is damaged, or does not fit what it is laid on."""

    exit_code = 2
    status = 400
    code = "bad_patch"


class EditError(GnomonError):
    """A change of knowledge could not be made: nothing was changed (command line exit code 3)."""

    exit_code = 3
    status = 400
    code = "edit_failed"


class WrongBase(PatchError):
    """A patch made for another model."""

    code = "wrong_base"


class PatchNotFound(GnomonError):
    """A patch of this name is not loaded (HTTP 404)."""

    exit_code = 2
    status = 404
    code = "patch_not_found"


class ChecksumMismatch(CheckpointError):
    """A fetched file's sha256 is not the one the zoo names."""

    code = "checksum_mismatch"


class FetchError(GnomonError):
    """A fetch failed: no network, no disk space, offline mode, unknown package or file."""

    code = "fetch_failed"


class LicenseRequired(FetchError):
    """The model's licence must be accepted first; the message gives the command."""

    code = "license_required"


class MissingExtra(GnomonError):
    """A capability needs an optional dependency; the message gives the pip command."""

    status = 400  # a request that asks for what this server has not: no fault that goes away when it is sent again
    code = "missing_extra"

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra `{extra}`.", hint=f"Install it: pip install 'gnomon[{extra}]'")


class OutOfMemory(GnomonError):
    """A request needs more key-value memory than the engine was given, or the machine has none left."""

    status = 400
    code = "out_of_memory"


class Overloaded(GnomonError):
    """The server's queue is full (HTTP 429 with Retry-After)."""

    status = 429
    code = "overloaded"


class NotReady(GnomonError):
    """The server is loading or shutting down (HTTP 503 with Retry-After)."""

    status = 503
    code = "not_ready"


class Blocked(GnomonError):
    """A guard or rail refused the text (command line exit code 3)."""

    exit_code = 3
    status = 400
    code = "content_filter"


class EngineFailure(GnomonError):
    """A step of the engine failed; the requests in it end with this error, the engine lives on."""

    code = "engine_failure"


class MergeError(UsageError):
    """Models, methods or parameters that cannot be merged; the message names tensor, model and parameter."""

    code = "merge_failed"
