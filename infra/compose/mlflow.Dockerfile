# The MLflow server: its version is the one of constraints.txt at the top of the repository.
FROM python:3.11.14-slim-bookworm
RUN pip install --no-cache-dir mlflow==3.17.2 Flask-WTF==1.3.0 psycopg2-binary==2.9.13 boto3==1.44.5 \
    && useradd --create-home --uid 1000 mlflow
USER 1000
WORKDIR /home/mlflow
EXPOSE 5000
