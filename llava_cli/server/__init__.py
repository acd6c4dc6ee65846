"""`llava serve`: a model behind the OpenAI API, over a Unix socket for our own commands and over TCP for others.

Start at `run.serve`. A request goes through `connection`, `guard`, `app`, `bodies`, `chat_request`, `pictures` and
`service` to the engine, and back through `responses` and `chat_response`.
"""
