//! Kusto: queued ingestion into Azure Data Explorer, as its official clients do it.
//!
//! Before it: [`crate::uplink`] has a batch.
//! After it: the blob and its message are with Azure; the service ingests them when it seals a batch of its own.
//! Thread: the uplink's runtime. Allocates: per delivery and per refresh, bounded; never for rows.
//! Invariant: a delivery needs no token and fetches nothing but its own requests; what it needs is fetched by one
//! background task, which keeps the old while the new does not come.
//! Not here: streaming ingestion, and how long to go on trying.
//!
//! | file | holds |
//! | --- | --- |
//! | `trusted.rs` | which hosts may be sent anything |
//! | `http.rs` | the client, bounded answers, `Retry-After` |
//! | `management.rs` | the endpoint: where to log in, management commands |
//! | `identity.rs`, `certificate.rs`, `token.rs` | who weir is, to a cached token |
//! | `resources.rs` | containers, queues and the identity token, refreshed |
//! | `ranking.rs` | which storage account is tried first |
//! | `message.rs`, `storage.rs`, `delivery.rs` | one delivery |
//! | `online.rs` | the walk of `weir check --online` |

mod certificate;
mod delivery;
mod http;
mod identity;
mod management;
mod message;
pub mod online;

mod ranking;
mod resources;
mod storage;
#[cfg(test)]
mod tests;
mod token;
pub mod trusted;

use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use crate::config::{KustoConfig, Mode, Table};
use crate::error::{Fatal, UploadError};
use http::Http;
use identity::IdentityIssuer;
use management::Endpoint;
use ranking::Ranking;
use resources::{Refresher, ResourceCache};
use token::TokenCache;
use trusted::TrustedHosts;

pub use delivery::{BlobMeta, BlobSource, Delivery, DeliveryMetrics};
pub use resources::RefreshMetrics;

/// What the service calls this client in its logs.
const CLIENT_VERSION: &str = concat!("Kusto.Weir:{", env!("CARGO_PKG_VERSION"), "}");

/// What a request is called in the service's logs; another for each request.
fn request_id() -> String {
    let mut bytes = [0; 16];
    fastrand::fill(&mut bytes);
    let id = uuid::Builder::from_random_bytes(bytes).into_uuid();
    format!("weir;{id}")
}

/// The destination: begins deliveries, and keeps in the background what they need.
pub struct Kusto {
    shared: Arc<Shared>,
    refresher: AbortHandle,
}

/// What deliveries share.
struct Shared {
    http: Http,
    tables: Vec<Table>,
    resources: Arc<ResourceCache>,
    ranking: Ranking,
    metrics: DeliveryMetrics,
}

impl Kusto {
    /// Starts fetching what deliveries need, on `runtime`. Waits for nothing and needs no network: a node starts, and
    /// takes rows, also while the service is away.
    pub fn open(config: &KustoConfig, tables: &[Table], runtime: &Handle) -> Result<Kusto, Fatal> {
        match config.mode {
            Mode::Queued => {}
        }
        let refresher = Arc::new(refresher(config)?);
        let shared = Arc::new(Shared {
            http: refresher.endpoint.http().clone(),
            tables: tables.to_vec(),
            resources: Arc::default(),
            ranking: Ranking::new(Instant::now()),
            metrics: DeliveryMetrics::default(),
        });
        let run = {
            let shared = shared.clone();
            refresher.run(shared.resources.clone(), move |resources| {
                let (containers, queues) = (&resources.containers, &resources.queues);
                shared.ranking.retain(containers.iter().chain(queues));
            })
        };
        Ok(Kusto {
            shared,
            refresher: runtime.spawn(run).abort_handle(),
        })
    }

    /// Begins the delivery of a batch. Nothing is sent before [`Delivery::attempt`].
    pub fn begin(&self, blob: BlobMeta) -> Delivery {
        Delivery::new(self.shared.clone(), blob)
    }

    pub fn delivery_metrics(&self) -> &DeliveryMetrics {
        &self.shared.metrics
    }

    pub fn refresh_metrics(&self) -> &RefreshMetrics {
        &self.shared.resources.metrics
    }

    /// Why the last refresh of the resources failed; nothing where it did not.
    pub fn refresh_error(&self) -> Option<UploadError> {
        self.shared.resources.error()
    }
}

impl Drop for Kusto {
    fn drop(&mut self) {
        self.refresher.abort();
    }
}

/// The way from a configuration to resources.
fn refresher(config: &KustoConfig) -> Result<Refresher, Fatal> {
    let trusted = TrustedHosts::of(&config.ingest_uri, &config.trusted_hosts)
        .expect("the configuration was checked with the same rule");
    let endpoint = Endpoint::new(config.ingest_uri.clone(), Http::new()?, trusted);
    let endpoint = Arc::new(endpoint);
    let issuer = IdentityIssuer {
        identity: config.identity.clone(),
        endpoint: endpoint.clone(),
    };
    Ok(Refresher {
        endpoint,
        tokens: TokenCache::new(issuer),
    })
}
