//! Storage of others, such as Azurite, that the stand-in hands out instead of its own.
//!
//! Before it: an account with its key. After it: signed URLs for clients, and the engine's own reading of queue and blobs.
//! Thread: the runtime's. Allocates: per request.
//! Invariant: plain HTTP to loopback only, which [`ExternalStorage`]'s addresses make sure of.
//! Not here: retries; the engine asks again.
//!
//! Source: Azure Storage REST, "Create Container", "Create Queue", "Get Messages", "Delete Message", "Get Blob".

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Bytes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::Deserialize;

use super::clock::later;
use super::sas::{self, AccountKey, Grant, StorageService};
use super::storage::Resource;

/// For how long the engine's own signature is good.
const OWN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// How early signatures start, against skewed clocks.
const EARLY: Duration = Duration::from_secs(900);
/// How long a message is hidden while the engine takes it.
const HIDDEN_SECONDS: u32 = 60;
const TIMEOUT: Duration = Duration::from_secs(60);

/// A storage account on loopback, path-style.
#[derive(Debug, Clone)]
pub struct ExternalStorage {
    pub blob_address: SocketAddr,
    pub queue_address: SocketAddr,
    pub account: String,
    /// The account's key, base64.
    pub key: String,
    /// Created where they are missing.
    pub containers: Vec<String>,
    pub queues: Vec<String>,
}

pub(super) struct External {
    options: ExternalStorage,
    key: AccountKey,
    /// The query that the engine itself uses.
    own_sas: String,
    sas_size: usize,
    sas_lifetime: Duration,
    client: reqwest::Client,
}

#[derive(Deserialize)]
struct Messages {
    #[serde(rename = "QueueMessage", default)]
    messages: Vec<Taken>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Taken {
    message_id: String,
    pop_receipt: String,
    message_text: String,
}

impl External {
    pub fn new(
        options: ExternalStorage,
        sas_size: usize,
        sas_lifetime: Duration,
        now: Timestamp,
    ) -> io::Result<External> {
        let loopback =
            options.blob_address.ip().is_loopback() && options.queue_address.ip().is_loopback();
        if !loopback {
            return Err(io::Error::other("external storage has to be on loopback"));
        }
        let key = STANDARD.decode(&options.key).map_err(io::Error::other)?;
        let key = AccountKey {
            account: options.account.clone(),
            key,
        };
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(TIMEOUT)
            .build()
            .map_err(io::Error::other)?;
        Ok(External {
            own_sas: key.account_sas(early(now), later(now, OWN_LIFETIME)),
            key,
            options,
            sas_size,
            sas_lifetime,
            client,
        })
    }

    fn uri(&self, service: StorageService, path: &str) -> String {
        let address = match service {
            StorageService::Blob => self.options.blob_address,
            StorageService::Queue => self.options.queue_address,
        };
        format!("http://{address}/{}/{path}", self.options.account)
    }

    /// Creates containers and queues where they are missing.
    pub async fn prepare(&self) -> io::Result<()> {
        let (containers, queues) = (self.options.containers.iter(), self.options.queues.iter());
        let containers = containers.map(|name| {
            format!(
                "{}?restype=container&{}",
                self.uri(StorageService::Blob, name),
                self.own_sas
            )
        });
        let queues = queues
            .map(|name| format!("{}?{}", self.uri(StorageService::Queue, name), self.own_sas));
        for uri in containers.chain(queues) {
            let request = self.client.put(uri).header("x-ms-version", sas::VERSION);
            let request = request.header("content-length", 0);
            let answer = request.send().await.map_err(told)?;
            // 204 and 409: it exists.
            if !matches!(answer.status().as_u16(), 201 | 204 | 409) {
                let status = answer.status();
                let body = answer.text().await.unwrap_or_default();
                return Err(io::Error::other(format!(
                    "the storage answered {status}: {body}"
                )));
            }
        }
        Ok(())
    }

    /// The rows of `.get ingestion resources`.
    pub fn resources(&self, now: Timestamp) -> Vec<Resource> {
        let sign = |service, name: &String, kind, permissions| {
            let grant = Grant {
                service,
                resource: name,
                permissions,
                starts: early(now),
                ends: later(now, self.sas_lifetime),
            };
            let signed = self.key.service_sas(&grant, self.sas_size);
            Resource {
                kind,
                uri: format!("{}?{}", self.uri(service, name), signed.query),
                signature: signed.signature,
            }
        };
        let queues = self.options.queues.iter();
        let queues = queues.map(|name| {
            sign(
                StorageService::Queue,
                name,
                "SecuredReadyForAggregationQueue",
                "a",
            )
        });
        let containers = self.options.containers.iter();
        let containers =
            containers.map(|name| sign(StorageService::Blob, name, "TempStorage", "rwd"));
        queues.chain(containers).collect()
    }

    /// Takes messages from every queue, and deletes them there. An error is told and means none.
    pub async fn take(&self) -> Vec<String> {
        let mut texts = Vec::new();
        for queue in &self.options.queues {
            match self.take_from(queue).await {
                Ok(taken) => texts.extend(taken),
                Err(error) => {
                    tracing::warn!(%error, queue, "the stand-in could not read an external queue")
                }
            }
        }
        texts
    }

    async fn take_from(&self, queue: &str) -> io::Result<Vec<String>> {
        let messages = format!("{}/messages", self.uri(StorageService::Queue, queue));
        let uri = format!(
            "{messages}?numofmessages=32&visibilitytimeout={HIDDEN_SECONDS}&{}",
            self.own_sas
        );
        let request = self.client.get(uri).header("x-ms-version", sas::VERSION);
        let answer = request
            .send()
            .await
            .map_err(told)?
            .error_for_status()
            .map_err(told)?;
        let body = answer.text().await.map_err(told)?;
        let body = body.trim_start_matches('\u{feff}');
        let list: Messages = quick_xml::de::from_str(body).map_err(io::Error::other)?;
        let mut texts = Vec::new();
        for taken in list.messages {
            let (id, receipt) = (&taken.message_id, sas::encode(&taken.pop_receipt));
            let uri = format!("{messages}/{id}?popreceipt={receipt}&{}", self.own_sas);
            let request = self.client.delete(uri).header("x-ms-version", sas::VERSION);
            request
                .send()
                .await
                .map_err(told)?
                .error_for_status()
                .map_err(told)?;
            texts.push(taken.message_text);
        }
        Ok(texts)
    }

    /// Status and body of a blob, by the URL of a message, whose SAS is the one that counts.
    pub async fn download(&self, blob_path: &str) -> Result<(u16, Bytes), String> {
        let answer = self
            .client
            .get(blob_path)
            .header("x-ms-version", sas::VERSION)
            .send()
            .await;
        let answer = answer.map_err(|error| error.without_url().to_string())?;
        let status = answer.status().as_u16();
        let body = answer
            .bytes()
            .await
            .map_err(|error| error.without_url().to_string())?;
        Ok((status, body))
    }
}

fn early(now: Timestamp) -> Timestamp {
    let early = jiff::SignedDuration::try_from(EARLY).unwrap_or_default();
    now.saturating_sub(early).unwrap_or(now)
}

/// An error without the URL, which holds a signature.
fn told(error: reqwest::Error) -> io::Error {
    io::Error::other(error.without_url())
}
