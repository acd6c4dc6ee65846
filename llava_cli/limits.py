"""How much of what strangers send is looked at: bytes, pixels, items, depth, seconds, connections.

The one table: whoever reads something from outside checks it against these before the work that it would cause.
What exceeds one is an error that names the limit. `SECURITY.md` says which boundary has which of them.
"""

from __future__ import annotations

# Pictures, wherever they come from.
PICTURE_BYTES = 100_000_000
PICTURE_PIXELS = 50_000_000
"""Read off the header, before any pixel is decoded."""
PICTURE_ASPECT = 200
"""The longer side over the shorter one: a strip that no vision tower can see, and some processors blow up."""
DECODE_SECONDS = 60.0
"""Wall-clock time in the sandbox for one picture."""

# Sandboxed processes.
SANDBOX_MEMORY = 4 * 2**30
"""Bytes of address space."""
SANDBOX_CPU_SECONDS = 600
"""Computing of one process in its whole life; a new one takes over before that is used up."""
SANDBOX_START_SECONDS = 60.0
"""Until a new process says that it is ready: 0.05 s, if the machine does not have thirty other things to do."""

# Pictures by URL.
FETCH_BYTES = 20_000_000
FETCH_SECONDS = 10.0
"""From looking up the name to the last byte, redirects included."""
FETCH_REDIRECTS = 5
FETCHES = 16
"""At a time, in one process."""

# Requests to `llava serve`.
CONNECTIONS = 256
"""Open at a time over TCP. The user's own socket is not counted, and always served."""
HEAD_SECONDS = 10.0
"""For a request line and its headers."""
HEAD_BYTES = 32_768
HEAD_FIELDS = 100
WRITE_SECONDS = 30.0
"""Until a client has taken what it was sent: nobody reads a stream any more whose connection stands still so long."""
LINGER_SECONDS = 2.0
"""For the rest of what a refused client is sending: where a connection is closed at once, the refusal is lost."""
BODY_SECONDS = 60.0
"""For a body, and for all pictures by URL that it names."""
BODY_BYTES = 64_000_000
"""Of a body, and of all pictures by URL that it names together."""
OWN_BODY_BYTES = 280_000_000
"""Of the user's own commands: two of the largest pictures that they open, in base64."""
BODIES_BYTES = 256_000_000
"""Of all request bodies together that came over TCP and are not parsed yet."""
BODY_DEPTH = 16
WAITING_BYTES = 1_000_000_000
"""Of all requests together that came over TCP and wait, parsed, for their pictures to be opened."""
LARGE_BODY_BYTES = 1_000_000
"""Of a body that is parsed while no other large one is. A quarter of `BODIES_BYTES` is for smaller ones alone."""
BODY_CHUNK_BYTES = 512
"""Of a chunked body's chunks, on average: to parse one takes as long as to look at 5 kB of what is in them."""
BODY_DEPTH = 16
BODY_ITEMS = 50_000
"""Values in a body's JSON."""
NUMBER_CHARACTERS = 400
"""Of a number in it: reading one takes time squared."""
TEXT_CHARACTERS = 1_000_000
"""Of a request's text, pictures not counted."""
REQUEST_STOPS = 64
"""Texts that end an answer: each is looked for at each token."""
REQUEST_PICTURES = 64
REQUEST_PICTURE_BYTES = 20_000_000
REQUEST_PIXELS = 100_000_000
"""Of all pictures of a request: a few kB of a PNG may be 50 megapixels, and each takes 3 bytes once it is decoded."""
QUICK_DECODE_SECONDS = 1.0
"""For one, before its request is one of those that take longer, for which others do not wait."""
SERVED_DECODE_SECONDS = 20.0
"""As `DECODE_SECONDS`, where others wait."""

# Answers of other servers (`--server`, and the user's own).
REPLY_BYTES = 64_000_000
"""Of one answer, streamed or not."""
REPLY_LINE_BYTES = 4_000_000
REPLY_HEAD_BYTES = 65_536
"""Of a status line and its headers, and of the URL that is asked; pictures by URL too."""
REPLY_ERROR_BYTES = 1_000_000
"""Of what comes with a status that is no success."""
REPLY_DEPTH = 32
REPLY_ITEMS = 2_000_000
REPLY_TOKENS = 1_000_000_000
"""That a server may say a prompt or an answer has."""
CONNECT_SECONDS = 10.0
REPLY_SECONDS = 600.0
"""Without a word of the answer, whatever else comes: a large model on a CPU reads a picture for minutes."""
OWN_REPLY_SECONDS = 86_400.0
"""The same of the user's own server, where a whole batch may be waiting for its turn."""
STATUS_BYTES = 65_536
"""Of what the user's own server says of itself."""
STATUS_SECONDS = 2.0
"""For it to say so."""
PATH_CHARACTERS = 4096
"""Of a name in it, which may be a path."""
NAME_CHARACTERS = 200
"""Of a name or message from outside that is shown to a person: the rest is cut off."""
SEQUENCE_CHARACTERS = 4096
"""Of one order to a terminal, as it is taken out of text; what is longer is text itself."""

# Checkpoints.
HEADER_BYTES = 32_000_000
"""Of a safetensors header."""
CONFIG_BYTES = 16_000_000
"""Of a JSON file of a checkpoint, the tokenizer's and the index of its shards excepted."""
TOKENIZER_BYTES = 128_000_000
JSON_DEPTH = 64
JSON_ITEMS = 5_000_000
CONFIG_LAYERS = 1_000
CONFIG_SIDE = 8_192
"""Pixels of a side to which a checkpoint's processor resizes pictures, or of its patches."""
CONFIG_IMAGE_TOKENS = 100_000
"""Of one picture in a prompt."""
TEMPLATE_CHARACTERS = 1_000_000
TEMPLATE_SECONDS = 5.0
"""To render one prompt."""
PROMPT_CHARACTERS = 16_000_000
"""Of a rendered prompt."""
TOKENIZE_SECONDS = 10.0
"""For one prompt, and for loading the tokenizer."""
TOKEN_CHARACTERS = 10_000
"""Of one token of a vocabulary."""
ADDED_TOKENS = 60_000
"""Of a vocabulary; each has a private-use character as its stand-in, and there are 65,534 of one plane."""
TEXT_MEMORY = 2 * 2**30
"""Bytes of address space for a checkpoint's template and tokenizer, in the sandbox."""

# The Hub, and its cache.
HUB_REPLY_BYTES = 32_000_000
"""Of the list of a repository's files."""
HUB_FILE_BYTES = 10**18
"""Of one file, as the Hub tells: more than any disk has."""
UNTOLD_FILE_BYTES = 100_000_000_000
"""Of one file whose size the Hub does not tell."""
COMMIT_BYTES = 100
"""Of a file that names a commit."""

# Files of rows, questions and settings.
ROW_BYTES = 64_000_000
ROW_DEPTH = 64
ROW_ITEMS = 1_000_000
COUNTED_NAMES = 1_000
"""Different keys of questions, or endings of names in a folder, that are counted to be told of."""
SETTINGS_BYTES = 16_000_000

# The user's own cache.
CACHE_FILE_BYTES = 16_000_000
"""Of a file that is read whole: digests, what a copy is made of, machine code."""
