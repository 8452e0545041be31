# Runs a family that was compiled elsewhere, without torch: docs/deploy.md.
#   docker build --tag tocom .                                                   ONNX Runtime, and the server
#   docker build --tag tocom --build-arg EXTRAS=openvino,serve .                 OpenVINO, and the server
#   docker build --tag tocom --build-arg EXTRAS=cpu .                            ONNX Runtime, `tocom infer` alone
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG EXTRAS=cpu,serve
RUN case ",${EXTRAS}," in *,openvino,*) \
      apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* ;; esac
WORKDIR /src
COPY . .
RUN python -m venv /opt/tocom \
    && /opt/tocom/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" \
    # the native merge operator of OpenVINO; without OpenVINO this only says so
    && /opt/tocom/bin/python -m tocom.runtime.native

FROM python:${PYTHON}-slim
COPY --from=build /opt/tocom /opt/tocom
ENV PATH=/opt/tocom/bin:$PATH PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
EXPOSE 8080 8081
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=4)"]
ENTRYPOINT ["tocom"]
CMD ["serve", "/family", "--host", "0.0.0.0"]
