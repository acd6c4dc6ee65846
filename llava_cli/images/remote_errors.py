"""Errors of libraries that read from servers -> ours, and calls that are tried again while that may help.

Botocore, aiohttp, httpx, Google's, Azure's and Hugging Face's libraries each have their own errors. They are told apart
by the code that the server sent, by the name of their class and by the HTTP status, so that none of them is imported
here. Their messages are not shown: some have signed URLs in them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import count
from threading import Event
from typing import Any, NamedTuple, TypeVar

from llava_cli import limits
from llava_cli.errors import InputMissing, LlavaError, SourceLost
from llava_cli.images.remote_names import scheme_of

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 8.0
"""Seconds before the second attempt and before later ones; each is up to half shorter, so that not all come at once."""
T = TypeVar("T")


class HttpStatus(Exception):
    """A server's answer that is not what was asked for."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class Failure(NamedTuple):
    """What went wrong."""

    reason: str
    hint: str = ""
    is_transient: bool = False
    """Whether the same call may work later."""
    is_of_all: bool = False
    """Whether nothing else can be read either."""
    needs_credentials: bool = False


_S3_ELSEWHERE = "AWS_ENDPOINT_URL names another server for s3://"
_NO_CREDENTIALS = Failure("no credentials for it were found", is_of_all=True, needs_credentials=True)
_REFUSED = Failure("the credentials for it are refused", is_of_all=True, needs_credentials=True)
_EXPIRED = Failure("the credentials for it have expired", is_of_all=True, needs_credentials=True)
_DENIED = Failure("access denied", needs_credentials=True)
_MISSING = Failure("it is not there")
_UNREACHABLE = Failure("its server cannot be reached", "is this machine online?", is_transient=True, is_of_all=True)
_BROKEN_OFF = Failure("its server does not answer, or broke off", is_transient=True)
_BUSY = Failure("its server is busy or failing", is_transient=True)
CHANGED = Failure("it changed while it was read")
_UNABLE = Failure("its server cannot do that")
_REGION = Failure("its bucket is in another region", "export AWS_DEFAULT_REGION=REGION names it", is_of_all=True)


def _table(*groups: tuple[Failure, str]) -> dict[str, Failure]:
    return {name: failure for failure, names in groups for name in names.split()}


_BY_NAME = _table(
    (_NO_CREDENTIALS, "NoCredentialsError PartialCredentialsError CredentialRetrievalError NoAuthTokenError"),
    (_NO_CREDENTIALS, "DefaultCredentialsError CredentialUnavailableError LocalTokenNotFoundError"),
    (Failure("AWS_PROFILE names no profile", "aws configure list-profiles", is_of_all=True), "ProfileNotFound"),
    (_EXPIRED, "ExpiredToken ExpiredTokenException RequestExpired TokenRefreshRequired TokenRetrievalError"),
    (_EXPIRED, "UnauthorizedSSOTokenError SSOTokenLoadError RefreshError"),
    (_REFUSED, "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken InvalidSecurity AuthenticationFailed"),
    (_REFUSED, "ClientAuthenticationError UnrecognizedClientException"),
    (Failure("this machine's clock is wrong", "timedatectl", is_of_all=True), "RequestTimeTooSkewed"),
    (_DENIED, "AccessDenied AllAccessDisabled AccountProblem AuthorizationFailure GatedRepoError Forbidden"),
    (Failure("there is no such bucket", is_of_all=True), "NoSuchBucket InvalidBucketName ContainerNotFound"),
    (Failure("no such data set, or a private one", "hf auth login", is_of_all=True), "RepositoryNotFoundError"),
    (Failure("there is no such revision", is_of_all=True), "RevisionNotFoundError"),
    (_MISSING, "NoSuchKey NoSuchVersion BlobNotFound ResourceNotFoundError EntryNotFoundError"),
    (_MISSING, "RemoteEntryNotFoundError"),
    (Failure("archived: it has to be restored first"), "InvalidObjectState BlobArchived"),
    (Failure("there is no bucket or object of such a name", is_of_all=True), "ParamValidationError"),
    (_UNABLE, "NotImplemented"),
    (CHANGED, "PreconditionFailed FileExpired ConditionNotMet"),
    (_REGION, "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException"),
    (_BUSY, "SlowDown ServiceUnavailable InternalError RequestTimeout OperationAborted ServerBusy Throttling"),
    (_UNREACHABLE, "EndpointConnectionError ConnectTimeoutError ConnectTimeout ConnectError ConnectionRefusedError"),
    (_UNREACHABLE, "ClientConnectorError ConnectionTimeoutError gaierror ServiceRequestError ProxyConnectionError"),
    (_BROKEN_OFF, "HTTPClientError ClientPayloadError IncompleteRead ResponseParserError FSTimeoutError"),
    (_BROKEN_OFF, "ResponseIncomplete ServerDisconnectedError ServerTimeoutError TransportError"),
    (_BROKEN_OFF, "ServiceResponseError ClientOSError"),
)
"""By a server's code or the name of an error's class."""
_BY_STATUS = {
    401: _REFUSED,
    403: _DENIED,
    404: _MISSING,
    408: _BROKEN_OFF,
    410: _MISSING,
    412: CHANGED,
    429: _BUSY,
    501: _UNABLE,
}
_BY_CLASS = _table(
    (_MISSING, "FileNotFoundError IsADirectoryError NotADirectoryError"),
    (_DENIED, "PermissionError"),
    (_BROKEN_OFF, "TimeoutError ConnectionError SSLError OSError"),
)
"""By the name of a class of Python's own, which says less."""


def failure_of(error: BaseException) -> Failure:
    """What an error of whatever library means."""
    chain = list(_chain(error))
    names = [name for one in chain for name in (_code(one), *(kind.__name__ for kind in type(one).__mro__))]
    named = [_BY_NAME[name] for name in names if name in _BY_NAME]
    statuses = [status for one in chain if isinstance(status := _status(one), int)]
    by_status = [_BY_STATUS.get(status) or (_BUSY if status >= 500 else None) for status in statuses]
    by_class = [_BY_CLASS[name] for name in names if name in _BY_CLASS and not statuses]
    words = f"its server answers {statuses[0]}" if statuses else f"it cannot be read ({type(error).__name__})"
    return next((failure for failure in (*named, *by_status, *by_class) if failure), Failure(words))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of whatever library is about."""
    return next((status for one in _chain(error) if isinstance(status := _status(one), int)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _code(error: Any) -> str:
    """The code that a server sent: botocore has it in the response, Azure's library in an attribute."""
    response = getattr(error, "response", None)
    of_botocore = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(of_botocore or getattr(error, "error_code", None) or "")


def _status(error: Any) -> Any:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    places = ((error, "status"), (error, "status_code"), (error, "code"), (response, "status_code"))
    return next((value for place, name in places if isinstance(value := getattr(place, name, None), int)), None)


class Patience:
    """Calls that are tried again for `limits.REMOTE_SECONDS`, in any number of threads.

    `source` is what messages call that from which everything is read, `sign_in` the command that finds credentials.
    """

    def __init__(self, source: str, sign_in: str = "") -> None:
        self._source, self._sign_in, self._ended = source, sign_in, Event()

    def end(self) -> None:
        """From now on nothing is tried again."""
        self._ended.set()

    def call(self, function: Callable[[], T], thing: str = "", is_in_use: bool = False) -> T:
        """What `function` returns, which is about one `thing` of the source, or about all of it.

        Raises `InputMissing`, which is a `SourceLost` if nothing of the source can be read any more: where that turns
        out with one thing, or, of a file that `is_in_use`, in any case.
        """
        end = time.monotonic() + limits.REMOTE_SECONDS
        for attempt in count():
            try:
                return function()
            except LlavaError:
                raise
            except Exception as error:
                failure = failure_of(error)
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1)
            is_late = time.monotonic() + pause > end
            if not failure.is_transient or is_late or self._ended.wait(pause):
                break
        hint = self._sign_in if failure.needs_credentials else failure.hint
        if failure is _UNREACHABLE and scheme_of(self._source) == "s3":
            hint = f"{hint} {_S3_ELSEWHERE}"
        if is_in_use or (thing and failure.is_of_all):
            raise SourceLost(self._source, failure.reason, f"{hint}; the same command resumes".removeprefix("; "))
        raise InputMissing(thing or self._source, failure.reason, hint)
