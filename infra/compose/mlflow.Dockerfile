# The MLflow server, in the versions of constraints.txt; it is built from the top of the repository.
FROM python:3.11.14-slim-bookworm
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt mlflow Flask-WTF psycopg2-binary boto3 \
    && useradd --create-home --uid 1000 mlflow
USER 1000
WORKDIR /home/mlflow
EXPOSE 5000
