"""A Google Cloud Storage server on loopback for tests, with one empty bucket. It keeps all in memory.

  python tests/gcs.py     prints its port, and serves until it is ended
"""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

BUCKET = "gs://bucket"


@contextlib.contextmanager
def running() -> Iterator[None]:
  """Starts one; epath and orbax use it, in this process and in those that it starts."""
  process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True)
  try:
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"
    with pytest.MonkeyPatch.context() as patch:
      for name, value in (("STORAGE_EMULATOR_HOST", url), ("FSSPEC_GCS_TOKEN", "anon"),
                          # Without this gcsfs asks the real service what kind of bucket it is.
                          ("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"),
                          ("TENSORSTORE_GCS_HTTP_URL", url), ("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")):
        patch.setenv(name, value)
      forget()
      yield
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    forget()


def forget() -> None:
  """fsspec and epath keep what reaches a store, whose address changes from test to test."""
  import gcsfs
  import s3fs
  from etils.epath import backend

  from axpo_jax import paths

  for store in (gcsfs.GCSFileSystem, s3fs.S3FileSystem):
    store.clear_instance_cache()
  backend.fsspec_backend._get_filesystem.cache_clear()
  paths._copies.clear()


def main() -> None:
  from gcp_storage_emulator import server
  from gcp_storage_emulator.handlers import objects

  download = objects.download

  def with_generation(request, response, storage, *args, **kwargs):
    """The service says which generation of an object it sends, the emulator does not; tensorstore
    insists on it."""
    download(request, response, storage, *args, **kwargs)
    if response.status < 400:
      found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
      response["x-goog-generation"] = found["generation"]

  objects.download = with_generation
  serving = server.create_server("127.0.0.1", 0, in_memory=True,
                                 default_bucket=BUCKET.removeprefix("gs://"))
  serving.start()
  print(serving._api._httpd.server_address[1], flush=True)
  threading.Event().wait()


if __name__ == "__main__":
  main()
