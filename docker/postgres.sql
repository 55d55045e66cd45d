-- The databases of the two servers, made as Postgres starts on an empty volume.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
