//! A plain client of the stand-in: what the real clients do, step by step, so that each step can be got wrong.

#![allow(dead_code)] // Each test binary uses its own part of this.

use std::io::Write;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use weir::standin::{Standin, StandinOptions};

/// How long a test waits for what must come before it calls it a hang.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const DATABASE: &str = "Telemetry";
pub const TABLE: &str = "Events";

/// A stand-in, a runtime, and an HTTP client.
pub struct Bench {
    pub standin: Standin,
    pub http: reqwest::Client,
    // Last, so that it outlives what runs on it.
    pub runtime: Runtime,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// Status and storage error code.
    pub fn error(&self) -> (u16, &str) {
        (self.status, self.header("x-ms-error-code"))
    }
}

/// One gzip member.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// `http://host/path?sas` with a blob's name behind the path.
pub fn blob_uri(container: &str, name: &str) -> String {
    let (path, sas) = container.split_once('?').unwrap();
    format!("{path}/{name}?{sas}")
}

/// A row of the envelope `fluent-bit`, with its newline.
pub fn row(number: u64) -> String {
    format!(
        "{{\"timestamp\":\"2026-11-23T09:15:02.123Z\",\"tag\":\"test\",\"log\":{{\"n\":{number}}}}}\n"
    )
}

/// The configuration of a weir in `directory` that delivers to `standin`; the client's secret is put there.
pub fn weir_config(
    standin: &Standin,
    directory: &std::path::Path,
    admin: std::net::SocketAddr,
    more: &str,
) -> String {
    let options = standin.options();
    std::fs::write(directory.join("secret"), &options.client_secret).unwrap();
    format!(
        "[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"{admin}\"\n\
         [destination]\ntype = \"kusto\"\ningest_uri = \"{}\"\n\
         [destination.identity.client_secret]\ntenant = \"{}\"\nclient_id = \"{}\"\nsecret = {{ file = \"secret\" }}\n\
         [spool]\ndirectory = \"spool\"\nsize = \"64MiB\"\n[dead_letter]\ndirectory = \"dead-letter\"\n\
         [batch]\nmax_age = \"100ms\"\n{more}",
        standin.ingest_uri(),
        options.tenant,
        options.client_id,
    )
}

impl Bench {
    pub fn start(options: StandinOptions) -> Bench {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let standin = Standin::start(options, runtime.handle()).unwrap();
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(PATIENCE)
            .build()
            .unwrap();
        Bench {
            standin,
            http,
            runtime,
        }
    }

    pub fn send(&self, request: reqwest::RequestBuilder) -> Result<Answer, reqwest::Error> {
        self.runtime.block_on(async {
            let response = request.send().await?;
            Ok(Answer {
                status: response.status().as_u16(),
                headers: response.headers().clone(),
                body: response.bytes().await?.into(),
            })
        })
    }

    pub fn uri(&self, path: &str) -> String {
        format!("{}{path}", self.standin.ingest_uri())
    }

    pub fn get(&self, uri: &str) -> Answer {
        self.send(self.http.get(uri)).unwrap()
    }

    /// The token endpoint's answer to a form.
    pub fn token_answer(&self, changes: &[(&str, &str)]) -> Answer {
        let options = self.standin.options();
        let mut form = vec![
            ("grant_type", "client_credentials"),
            ("client_id", &options.client_id),
            ("client_secret", &options.client_secret),
            ("scope", "https://kusto.kusto.windows.net/.default"),
        ];
        for (name, value) in changes {
            form.retain(|(other, _)| other != name);
            form.push((name, value));
        }
        let mut body = url::form_urlencoded::Serializer::new(String::new());
        body.extend_pairs(form);
        let uri = format!(
            "{}/{}/oauth2/v2.0/token",
            self.standin.token_authority(),
            options.tenant
        );
        let request = self.http.post(uri).body(body.finish());
        self.send(request.header("content-type", "application/x-www-form-urlencoded"))
            .unwrap()
    }

    pub fn token(&self) -> String {
        let answer = self.token_answer(&[]);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["access_token"].as_str().unwrap().to_owned()
    }

    /// The answer to a management command.
    pub fn command_with(&self, token: &str, csl: &str) -> Answer {
        let body = json!({"db": DATABASE, "csl": csl}).to_string();
        let request = self
            .http
            .post(self.uri("/v1/rest/mgmt"))
            .body(body)
            .bearer_auth(token);
        self.send(request.header("content-type", "application/json"))
            .unwrap()
    }

    pub fn command(&self, csl: &str) -> Answer {
        self.command_with(&self.token(), csl)
    }

    /// The rows of a command that has to succeed.
    pub fn rows_of(&self, csl: &str) -> Vec<Value> {
        let answer = self.command(csl);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["Tables"][0]["Rows"]
            .as_array()
            .unwrap()
            .clone()
    }

    /// The URLs of one kind of resource.
    pub fn resources(&self, kind: &str) -> Vec<String> {
        let rows = self.rows_of(".get ingestion resources").into_iter();
        let rows = rows.filter(|row| row[0] == kind);
        rows.map(|row| row[1].as_str().unwrap().to_owned())
            .collect()
    }

    pub fn container(&self) -> String {
        self.resources("TempStorage").swap_remove(0)
    }

    pub fn queue(&self) -> String {
        self.resources("SecuredReadyForAggregationQueue")
            .swap_remove(0)
    }

    pub fn identity_token(&self) -> String {
        let rows = self.rows_of(".get kusto identity token");
        assert_eq!(rows.len(), 1);
        rows[0][0].as_str().unwrap().to_owned()
    }

    /// Put Blob, with the length even where there is none.
    pub fn put(&self, uri: &str, bytes: impl Into<Vec<u8>>) -> reqwest::RequestBuilder {
        let bytes = bytes.into();
        let request = self.http.put(uri).header("x-ms-version", "2021-12-02");
        let request = request.header("content-length", bytes.len());
        request.header("x-ms-blob-type", "BlockBlob").body(bytes)
    }

    /// Uploads a blob into the first container; gives its URL with SAS.
    pub fn upload(&self, name: &str, bytes: &[u8]) -> String {
        let uri = blob_uri(&self.container(), name);
        let answer = self.send(self.put(&uri, bytes.to_vec())).unwrap();
        assert_eq!(answer.status, 201, "{answer:?}");
        uri
    }

    /// A message as it should be.
    pub fn message(&self, blob_path: &str, raw_size: usize) -> Value {
        json!({
            "Id": uuid::Uuid::new_v4().to_string(),
            "BlobPath": blob_path,
            "RawDataSize": raw_size,
            "DatabaseName": DATABASE,
            "TableName": TABLE,
            "RetainBlobOnSuccess": true,
            "ReportLevel": 0,
            "ReportMethod": 0,
            "AdditionalProperties": {
                "authorizationContext": self.identity_token(),
                "format": "json",
            },
        })
    }

    pub fn post(&self, queue: &str, text: &str) -> reqwest::RequestBuilder {
        let (path, sas) = queue.split_once('?').unwrap();
        let xml = format!(
            "<?xml version=\"1.0\" encoding=\"utf-8\"?><QueueMessage><MessageText>{text}</MessageText></QueueMessage>"
        );
        let request = self.http.post(format!("{path}/messages?{sas}")).body(xml);
        request
            .header("content-type", "application/xml")
            .header("x-ms-version", "2021-12-02")
    }

    pub fn enqueue(&self, message: &Value) {
        let text = STANDARD.encode(message.to_string());
        let answer = self.send(self.post(&self.queue(), &text)).unwrap();
        assert_eq!(answer.status, 201, "{answer:?}");
    }

    pub fn settle(&self) {
        assert!(self.standin.wait_settled(PATIENCE), "messages are left");
    }

    /// Uploads, posts and waits: the whole way of one blob. `change` may spoil the message.
    pub fn ingest(
        &self,
        name: &str,
        bytes: &[u8],
        raw_size: usize,
        change: impl FnOnce(&mut Value),
    ) {
        let blob_path = self.upload(name, bytes);
        let mut message = self.message(&blob_path, raw_size);
        change(&mut message);
        self.enqueue(&message);
        self.settle();
    }

    /// The codes of all failures so far.
    pub fn failure_codes(&self) -> Vec<String> {
        let failures = self.standin.failures().into_iter();
        failures.map(|failure| failure.error_code).collect()
    }

    pub fn row_count(&self) -> u64 {
        self.standin.row_count(DATABASE, TABLE)
    }
}
