"""Limits on input from outside: bytes, pixels, items, depth, seconds, connections.

Code that reads something from outside checks it against these limits before doing the work that it would cause. What
exceeds one is an error that names the limit. `SECURITY.md` lists the limits of each boundary.
"""

from __future__ import annotations

# Pictures from any source.
PICTURE_BYTES = 100_000_000
PICTURE_PIXELS = 50_000_000
"""Taken from the header, before any pixel is decoded."""
PICTURE_ASPECT = 200
"""The longer side over the shorter one. No vision tower can use such a strip, and some processors blow it up."""
DECODE_SECONDS = 60.0
"""Wall-clock time in the sandbox for one picture."""

# Files of several pictures.
PAGES = 100_000
"""Pages or frames of one file that are looked at."""
PAGE_SECONDS = 10.0
"""To draw one page, or to find and decode one frame."""
LATE_PAGES = 3
"""Pages or frames of one file that took longer, or pages that ended their process: the others are not tried."""
PAGE_SIDE = 4_000
"""Pixels of the longer side of a page that is drawn."""
DOCUMENT_MEMORY = 2 * 2**30
"""Bytes of address space of the process that draws pages."""
ASK_PAGES = 4
"""Of a document in a question, unless --pages says which."""
QUESTION_PICTURES = 100
"""Of one file in a question, if options say which, and files on the clipboard: each may take 30 MB of memory."""
FILM_BYTES = 50_000_000_000
"""All of a film is read once, for its hash."""
FILM_FRAMES = 4
"""Of a film, unless --frames or --every says how many."""
FILM_SECONDS = 10_000_000.0
"""The longest time between two frames, and the longest film; the rest of one is left out."""

# Archives and tables of pictures.
EXPANDED_WORDS = 100_000
"""That braces in a SOURCE stand for."""
ARCHIVE_MEMBERS = 10_000_000
MEMBER_HEADER_BYTES = 1_000_000
"""Of what a tar says of one member before its bytes, such as a long name."""
MEMBER_NAME_BYTES = 4096
"""As long as Linux's paths."""
ARCHIVE_WINDOW_BYTES = 256_000_000
"""What decompressing an archive may keep of what was before; `xz -9` takes 65 MB."""
ARCHIVE_RATIO = 1_000
"""What a compressed tar may unpack to, in times of its own size; gzip itself ends at 1,032."""
ARCHIVE_SLACK_BYTES = 1_000_000_000
"""What a compressed tar may unpack to besides, for small ones."""
TABLE_MEMORY = 4 * 2**30
"""Bytes of address space of the process that reads a table in columns."""
TABLE_READ_BYTES = 8_000_000
"""Of the table's file that the process gets at a time."""
TABLE_SECONDS = 60.0
"""To read one picture, or a hundred rows of what stands beside them."""
TABLE_COLUMNS = 10_000
CONTEXT_BYTES = 100_000
"""Of what a source says of one picture besides, as JSON: a table's other columns, a `.json` beside it."""

# The clipboard and the screen.
CLIPBOARD_SECONDS = 2.0
"""Until a program that reads the clipboard has answered; it waits for the program that was copied from."""
SCREEN_SECONDS = 10.0
"""Until a program has written its picture of the screen."""

# What questions are filled in with.
EXIF_BYTES = 1_000_000
"""Of all EXIF values of a picture."""
EXIF_CHARACTERS = 1_000
"""Of one of them; the rest is cut off."""
EXIF_SECONDS = 10.0
"""To read those of one picture."""
QUESTION_SECONDS = 5.0
"""To fill in one question."""
QUESTION_MEMORY = 2**29
"""Bytes of address space for that."""
SAVED_PROMPT_BYTES = 1_000_000
"""Of a saved prompt's file."""

# Sandboxed processes.
SANDBOX_MEMORY = 4 * 2**30
"""Bytes of address space."""
SANDBOX_CPU_SECONDS = 600
"""CPU time of one process in its whole life; a new one takes over before that is used up."""
SANDBOX_START_SECONDS = 60.0
"""Until a new process is ready: usually 0.05 s, but the machine may be busy."""

# Pictures by URL.
FETCH_BYTES = 20_000_000
FETCH_SECONDS = 10.0
"""From the name lookup to the last byte, redirects included."""
FETCH_REDIRECTS = 5
FETCHES = 16
"""At a time in one process."""

# Buckets, data sets and archives by URL.
REMOTE_SECONDS = 60.0
"""For one object or one part of an archive, all attempts together; after that it counts as unreadable."""
REMOTE_STALL_SECONDS = 20.0
"""Between two parts of an answer."""
REMOTE_BYTES = 10**15
"""Of an archive by URL, which is read as a stream."""

# Requests to `llava serve`.
CONNECTIONS = 256
"""Open at a time over TCP. The user's own socket is always served and not counted."""
HEAD_SECONDS = 10.0
"""For a request line and its headers."""
HEAD_BYTES = 32_768
HEAD_FIELDS = 100
WRITE_SECONDS = 30.0
"""Until a client has taken what it was sent; a stream that stalls for so long has no reader."""
LINGER_SECONDS = 2.0
"""For the rest of a refused request: if the connection were closed at once, the refusal would be lost."""
BODY_SECONDS = 60.0
"""For a body and all pictures by URL in it."""
BODY_BYTES = 64_000_000
"""Of a body and all pictures by URL in it together."""
OWN_BODY_BYTES = 280_000_000
"""Of the user's own commands: two pictures of the largest size that they open, in base64."""
BODIES_BYTES = 256_000_000
"""Of all request bodies over TCP that are not parsed yet, together."""
BODY_DEPTH = 72
"""Of a body's JSON: a schema in it may have `SCHEMA_DEPTH` levels."""
WAITING_BYTES = 1_000_000_000
"""Of all parsed requests over TCP that wait for their pictures to be opened, together."""
LARGE_BODY_BYTES = 1_000_000
"""From this size on, bodies are parsed one at a time. A quarter of `BODIES_BYTES` is reserved for smaller ones."""
BODY_CHUNK_BYTES = 512
"""The least that the chunks of a chunked body have on average: parsing one takes as long as reading 5 kB of data."""
BODY_ITEMS = 50_000
"""Values in a body's JSON."""
NUMBER_CHARACTERS = 400
"""Of a number in a body: reading one takes quadratic time."""
TEXT_CHARACTERS = 1_000_000
"""Of a request's text without its pictures."""
REQUEST_STOPS = 64
"""Texts that end an answer; each token is checked against each of them."""
REQUEST_SCHEMA_CHARACTERS = 100_000
"""Of a schema over TCP: one of this size compiles in up to 1 s, during which other forms wait."""
REQUEST_CHOICES_CHARACTERS = 4_000
"""Of all choices of a request over TCP: each is read in up to eight spellings, in one step."""
FORM_SECONDS = 3.0
"""To compile a schema, regex or grammar in the sandbox."""
FORM_MEMORY = 2**29
"""Bytes of address space for that."""
FORM_STACK_BYTES = 2 * 2**20
"""Of stack for that: a quarter of what the server's threads have."""
REQUEST_PICTURES = 64
REQUEST_PICTURE_BYTES = 20_000_000
REQUEST_PIXELS = 100_000_000
"""Of all pictures of a request: a PNG of a few kB may have 50 megapixels, of 3 bytes each once decoded."""
QUICK_DECODE_SECONDS = 1.0
"""For one picture; after that its request counts as slow, and others do not wait for it."""
SERVED_DECODE_SECONDS = 20.0
"""As `DECODE_SECONDS`, in a server, where others wait."""

# Answers of other servers (`--server`, and the user's own).
REPLY_BYTES = 64_000_000
"""Of one answer, streamed or not."""
REPLY_LINE_BYTES = 4_000_000
REPLY_HEAD_BYTES = 65_536
"""Of a status line with its headers, and of a requested URL, also that of a picture."""
REPLY_ERROR_BYTES = 1_000_000
"""Of the body of an error."""
REPLY_DEPTH = 72
"""Of a reply's JSON: an answer's object in it may have `ANSWER_DEPTH` levels."""
REPLY_ITEMS = 2_000_000
REPLY_TOKENS = 1_000_000_000
"""The most that a server may report for a prompt or an answer."""
CONNECT_SECONDS = 10.0
REPLY_SECONDS = 600.0
"""Until the next token of the answer: a large model on a CPU takes minutes to read a picture."""
OWN_REPLY_SECONDS = 86_400.0
"""The same for the user's own server, where a whole batch may be in the queue before."""
STATUS_BYTES = 65_536
"""Of the user's own server's description of itself."""
STATUS_SECONDS = 2.0
"""Until that description is there."""
PATH_CHARACTERS = 4096
"""Of a name in that description, which may be a path."""
NAME_CHARACTERS = 200
"""Of a name or message from outside that is shown to a person; the rest is cut off."""
SEQUENCE_CHARACTERS = 4096
"""Of a terminal's control sequence that is removed from text; a longer one is shown as text."""

# Checkpoints.
HEADER_BYTES = 32_000_000
"""Of a safetensors header."""
CONFIG_BYTES = 16_000_000
"""Of a JSON file of a checkpoint, except its tokenizer's and the index of its shards."""
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
TOKENIZE_SECONDS = 30.0
"""For one prompt, and for loading the tokenizer."""
TOKEN_CHARACTERS = 10_000
"""Of one token of a vocabulary."""
ADDED_TOKENS = 60_000
"""Of a vocabulary. Each gets a private-use character as its stand-in, and a plane has 65,534 of them."""
TEXT_MEMORY = 2 * 2**30
"""Bytes of address space for a checkpoint's template and tokenizer, in the sandbox."""

# The Hub, and its cache.
HUB_REPLY_BYTES = 32_000_000
"""Of the list of a repository's files."""
HUB_FILE_BYTES = 10**18
"""Of one file whose size the Hub states: more than any disk has."""
UNSIZED_FILE_BYTES = 100_000_000_000
"""Of one file whose size the Hub does not state."""
COMMIT_BYTES = 100
"""Of a file that names a commit."""

# Files of rows, questions and settings.
ROW_BYTES = 64_000_000
ROW_DEPTH = 64
ROW_ITEMS = 1_000_000
ANSWER_DEPTH = 60
"""Of the object that an answer is, which stands in a row and in a reply."""
CHOICES = 256
"""Answers that a model chooses from; each is read in up to eight spellings."""
CHOICE_CHARACTERS = 1_000
CALIBRATION_ROWS = 1_000_000
"""Labelled rows that a calibration is fitted to: they are in memory."""
CALIBRATION_LEVELS = 100
"""Thresholds in a calibration's file."""
SCHEMA_BYTES = 1_000_000
"""Of a JSON schema that answers must fit."""
SCHEMA_DEPTH = 64
SCHEMA_REF_DEPTH = 256
"""With what its `$ref`s point to in their place; llguidance's stack ends at three times as many levels."""
SCHEMA_ITEMS = 100_000
SCHEMA_FIELDS_CHARACTERS = 10_000
"""Of a schema that is written as a line of fields."""
SCHEMA_PROPERTIES = 1_000
"""Of one object; the time grows with their square."""
SCHEMA_PATTERNS = 64
"""All `patternProperties` of a schema: each is held against all others."""
SCHEMA_MULTIPLE = 100_000
"""The product of the different significant digits behind `multipleOf`: a state is made for each remainder."""
REGEX_CHARACTERS = 10_000
GRAMMAR_BYTES = 100_000
GRAMMAR_RULES = 500
"""Rules and terminals of a Lark grammar: llguidance's stack ends where a thousand refer to each other in a chain."""
GRAMMAR_STATES = 50_000
"""Of the automaton that is made of a schema, regex or grammar as answers go on: 1 to 2 kB each."""
EXPORT_COLUMNS = 1_000
"""Keys of rows that become columns of a table."""
SIDECAR_BYTES = 4_000_000
"""Of a text or XMP file beside a picture that a new description may go into."""
SIDECAR_DEPTH = 100
"""Of elements in such an XMP file."""
COUNTED_NAMES = 1_000
"""Different unread keys of questions, or suffixes of passed-over files, that are counted for a note."""
SETTINGS_BYTES = 16_000_000
MANIFEST_INDEX_BYTES = 16_000_000
"""Beside a manifest; a larger one is made anew at each start."""

# The user's own cache.
CACHE_FILE_BYTES = 16_000_000
"""Of a file that is read whole: digests, the description of a copy, machine code."""
