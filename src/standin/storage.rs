//! Storage accounts: which containers and queues there are, the URLs that are handed out, and who may do what.
//!
//! Before it: [`super::mgmt`] hands the URLs out, and a client comes with one.
//! After it: [`blob`] and [`queue`] do what was asked. Thread: the runtime's. Allocates: freely.
//! Invariant: nothing is stored or given without a signature that holds now, for this resource and this act.
//! Not here: storage of others ([`super::external`]).
//!
//! Addresses are path-style, as Azurite's: `http://127.0.0.1:PORT/account0/CONTAINER/BLOB?SAS`.
//! Each account has a port of its own for blobs and one for queues, so that one can die and the others live.

pub(super) mod blob;
pub(super) mod queue;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;

use super::Service;
use super::clock::later;
use super::sas::{AccountKey, Grant, StorageService};

/// Signatures that [`Storage::withdraw`] can withdraw.
const ISSUED_COUNT_MAX: usize = 100_000;

/// An error answer of Azure Storage.
#[derive(Debug)]
pub(super) struct StorageError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl StorageError {
    pub fn new(status: u16, code: &'static str, message: impl Into<String>) -> StorageError {
        StorageError {
            status: StatusCode::from_u16(status).expect("a status of Azure's"),
            code,
            message: message.into(),
        }
    }

    fn denied(detail: impl Into<String>) -> StorageError {
        let detail = detail.into();
        let message = "Server failed to authenticate the request. Make sure the value of Authorization header is \
                       formed correctly including the signature.";
        StorageError::new(403, "AuthenticationFailed", format!("{message}\n{detail}"))
    }
}

impl IntoResponse for StorageError {
    fn into_response(self) -> Response {
        let body = format!(
            "\u{feff}<?xml version=\"1.0\" encoding=\"utf-8\"?><Error><Code>{}</Code><Message>{}</Message></Error>",
            self.code,
            quick_xml::escape::escape(self.message.as_str())
        );
        let headers = [
            ("x-ms-error-code", self.code),
            (header::CONTENT_TYPE.as_str(), "application/xml"),
        ];
        (self.status, headers, body).into_response()
    }
}

/// What the routers of one account's ports know.
#[derive(Clone)]
pub(super) struct Place {
    pub service: std::sync::Arc<Service>,
    pub account: usize,
}

/// A query, decoded where one asks.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub fn of(uri: &axum::http::Uri) -> Query {
        Query::parse(uri.query().unwrap_or_default())
    }

    pub fn parse(query: &str) -> Query {
        let pairs = url::form_urlencoded::parse(query.as_bytes());
        Query(pairs.into_owned().collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        let pair = self.0.iter().find(|(key, _)| key == name)?;
        Some(&pair.1)
    }
}

/// Where an account answers.
pub(super) struct Addresses {
    pub blob: SocketAddr,
    pub queue: SocketAddr,
}

struct Account {
    addresses: Addresses,
    key: AccountKey,
}

/// All accounts.
pub(super) struct Storage {
    accounts: Vec<Account>,
    container_count: usize,
    queue_count: usize,
    sas_size: usize,
    sas_lifetime: Duration,
    names: Mutex<Names>,
    pub blobs: blob::Store,
    pub queues: queue::Queues,
}

#[derive(Default)]
struct Names {
    /// Counts the rotations; part of every name.
    generation: u32,
    /// Names before this rotation are gone.
    first_generation: u32,
    /// Signatures that have not been withdrawn.
    issued: Vec<String>,
    issued_count: i64,
    withdrawn: HashSet<String>,
}

/// A type of resource, and what its SAS grants.
struct Kind {
    name: &'static str,
    service: StorageService,
    permissions: &'static str,
}

const CONTAINER: Kind = Kind {
    name: "TempStorage",
    service: StorageService::Blob,
    permissions: "rwd",
};
const QUEUE: Kind = Kind {
    name: "SecuredReadyForAggregationQueue",
    service: StorageService::Queue,
    permissions: "a",
};
const SUCCESSES: Kind = Kind {
    name: "SuccessfulIngestionsQueue",
    service: StorageService::Queue,
    permissions: "rp",
};
const FAILURES: Kind = Kind {
    name: "FailedIngestionsQueue",
    service: StorageService::Queue,
    permissions: "rp",
};

/// One row of `.get ingestion resources`, and its signature.
pub(super) struct Resource {
    pub kind: &'static str,
    pub uri: String,
    pub signature: String,
}

pub(super) struct StorageOptions {
    pub container_count: usize,
    pub queue_count: usize,
    pub sas_size: usize,
    pub sas_lifetime: Duration,
    pub blobs_size_max: usize,
}

impl Storage {
    pub fn new(addresses: Vec<Addresses>, options: &StorageOptions) -> Storage {
        let accounts = addresses.into_iter().enumerate();
        let accounts = accounts.map(|(index, addresses)| Account {
            addresses,
            key: AccountKey {
                account: account_name(index),
                key: uuid::Uuid::new_v4().into_bytes().to_vec(),
            },
        });
        Storage {
            accounts: accounts.collect(),
            container_count: options.container_count,
            queue_count: options.queue_count,
            sas_size: options.sas_size,
            sas_lifetime: options.sas_lifetime,
            names: Mutex::default(),
            blobs: blob::Store::new(options.blobs_size_max),
            queues: queue::Queues::default(),
        }
    }

    /// New names for all containers and queues. The old ones stay if `keep_old`; otherwise they answer 404 to writers.
    pub fn rotate(&self, keep_old: bool) {
        let mut names = self.names.lock().unwrap();
        names.generation += 1;
        if !keep_old {
            names.first_generation = names.generation;
        }
    }

    /// All signatures handed out so far count as expired from now on.
    pub fn withdraw(&self) {
        let mut names = self.names.lock().unwrap();
        let issued = std::mem::take(&mut names.issued);
        names.withdrawn.extend(issued);
    }

    /// The rows of `.get ingestion resources`, freshly signed, account by account.
    pub fn resources(&self, now: Timestamp) -> Vec<Resource> {
        let mut names = self.names.lock().unwrap();
        let generation = names.generation;
        let mut resources = Vec::new();
        for account in 0..self.accounts.len() {
            for index in 0..self.queue_count {
                let name = queue_name(generation, index);
                resources.push(self.sign(&mut names, now, account, &QUEUE, &name));
            }
            for index in 0..self.container_count {
                let name = container_name(generation, index);
                resources.push(self.sign(&mut names, now, account, &CONTAINER, &name));
            }
        }
        for (kind, name) in [(&SUCCESSES, SUCCEEDED_QUEUE), (&FAILURES, FAILED_QUEUE)] {
            resources.push(self.sign(&mut names, now, 0, kind, name));
        }
        resources
    }

    fn sign(
        &self,
        names: &mut Names,
        now: Timestamp,
        account: usize,
        kind: &Kind,
        resource: &str,
    ) -> Resource {
        // Azure starts a SAS some minutes early, against skewed clocks. Here the start also makes each one unique.
        names.issued_count += 1;
        let early = jiff::SignedDuration::from_secs(300 + names.issued_count % 1_000_000);
        let Account { addresses, key } = &self.accounts[account];
        let grant = Grant {
            service: kind.service,
            resource,
            permissions: kind.permissions,
            starts: now.saturating_sub(early).unwrap_or(now),
            ends: later(now, self.sas_lifetime),
        };
        let signed = key.service_sas(&grant, self.sas_size);
        if names.issued.len() < ISSUED_COUNT_MAX {
            names.issued.push(signed.signature.clone());
        }
        let address = match kind.service {
            StorageService::Blob => addresses.blob,
            StorageService::Queue => addresses.queue,
        };
        Resource {
            kind: kind.name,
            uri: format!(
                "http://{address}/{}/{resource}?{}",
                key.account, signed.query
            ),
            signature: signed.signature,
        }
    }

    /// Whether the query's SAS grants `permissions` (any one of the letters) on the resource now.
    pub fn authorize(
        &self,
        now: Timestamp,
        account: usize,
        service: StorageService,
        resource: &str,
        permissions: &str,
        query: &Query,
    ) -> Result<(), StorageError> {
        let value = |name: &str| query.get(name).unwrap_or_default().to_owned();
        let Some(signature) = query.get("sig") else {
            let message = "Server failed to authenticate the request. Please refer to the information in the \
                           www-authenticate header.";
            return Err(StorageError::new(
                401,
                "NoAuthenticationInformation",
                message,
            ));
        };
        if !self.accounts[account]
            .key
            .verifies(service, resource, &value, signature)
        {
            return Err(StorageError::denied("Signature did not match."));
        }
        let withdrawn = self.names.lock().unwrap().withdrawn.contains(signature);
        let expired = value("se").parse::<Timestamp>().is_ok_and(|end| end <= now);
        if withdrawn || expired {
            return Err(StorageError::denied(
                "Signature not valid in the specified time frame",
            ));
        }
        if !value("sp").contains(|letter| permissions.contains(letter)) {
            let message =
                "This request is not authorized to perform this operation using this permission.";
            return Err(StorageError::new(
                403,
                "AuthorizationPermissionMismatch",
                message,
            ));
        }
        Ok(())
    }

    /// Whether writers may still use the name.
    fn exists(&self, service: StorageService, resource: &str) -> bool {
        if service == StorageService::Queue && [SUCCEEDED_QUEUE, FAILED_QUEUE].contains(&resource) {
            return true;
        }
        let names = self.names.lock().unwrap();
        (names.first_generation..=names.generation).any(|generation| match service {
            StorageService::Blob => {
                (0..self.container_count).any(|index| container_name(generation, index) == resource)
            }
            StorageService::Queue => {
                (0..self.queue_count).any(|index| queue_name(generation, index) == resource)
            }
        })
    }

    /// The account whose blob port this is.
    pub fn account_of_blob_port(&self, port: u16) -> Option<usize> {
        self.accounts
            .iter()
            .position(|account| account.addresses.blob.port() == port)
    }
}

/// Where successes are reported, if a message asks for it.
pub(super) const SUCCEEDED_QUEUE: &str = "successfulingestions";
/// Where failures are reported, if a message asks for it.
pub(super) const FAILED_QUEUE: &str = "failedingestions";

fn account_name(index: usize) -> String {
    format!("account{index}")
}

fn container_name(generation: u32, index: usize) -> String {
    format!("ingestdata-g{generation}-{index}")
}

fn queue_name(generation: u32, index: usize) -> String {
    format!("readyforaggregation-secured-g{generation}-{index}")
}

impl Place {
    /// What every request to storage has to get past.
    fn admit(
        &self,
        account_name: &str,
        service: StorageService,
        resource: &str,
        permissions: &str,
        query: &Query,
        headers: &HeaderMap,
    ) -> Result<(), StorageError> {
        let standin = &self.service;
        if headers.contains_key(header::AUTHORIZATION) {
            standin.journal.violation(
                "an Authorization header went to storage, which is for the SAS alone: it leaks a Kusto token",
            );
        }
        if account_name != self::account_name(self.account) {
            let message = format!("this port is for {}", self::account_name(self.account));
            return Err(StorageError::new(400, "InvalidUri", message));
        }
        let now = standin.clock.now();
        standin
            .storage
            .authorize(now, self.account, service, resource, permissions, query)?;
        match (standin.storage.exists(service, resource), service) {
            (true, _) => Ok(()),
            (false, StorageService::Blob) => Err(StorageError::new(
                404,
                "ContainerNotFound",
                "The specified container does not exist.",
            )),
            (false, StorageService::Queue) => Err(StorageError::new(
                404,
                "QueueNotFound",
                "The specified queue does not exist.",
            )),
        }
    }
}

/// What nothing is served on.
pub(super) async fn unknown() -> StorageError {
    StorageError::new(
        400,
        "InvalidUri",
        "The requested URI does not represent any resource on the server.",
    )
}

/// Decodes strict standard base64.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}
