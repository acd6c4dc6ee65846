"""One warm model behind the OpenAI API: on a socket for our own commands, on TCP for everybody else's."""
