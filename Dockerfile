# A model behind HTTP:  docker run -p 8000:8000 -e ASTBENCH_API_KEY=KEY -v $PWD/runs/NAME:/model:ro astbench
FROM python:3.11-slim

# The CPU's wheels; for CUDA build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY astbench ./astbench
COPY registry ./registry
COPY kernels ./kernels
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" '.[serve]' \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin astbench

ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HOME=/tmp
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["astbench", "serve", "--host=0.0.0.0", "--port=8000"]
CMD ["/model"]
