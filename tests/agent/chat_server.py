"""A server on loopback that speaks OpenAI's chat completions: a user or a judge that a test scripts."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def serving(reply):
  """Yields the address, with /v1, and the list of requests' bodies.

  Args:
    reply: from the text of the last message to the answer's.
  """
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      asked.append(body)
      answer = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
        {"index": 0, "finish_reason": "stop",
         "message": {"role": "assistant", "content": reply(body["messages"][-1]["content"])}}]}).encode()
      self.send_response(200 if self.path == "/v1/chat/completions" else 404)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(answer)))
      self.end_headers()
      self.wfile.write(answer)

    def log_message(self, *arguments):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
      server.shutdown()
