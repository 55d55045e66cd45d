-- The databases of the two servers. Postgres creates them when it starts with an empty volume.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
