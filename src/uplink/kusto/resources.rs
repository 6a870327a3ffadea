//! Ingestion resources: containers, queues and the identity token, fetched in the background.
//!
//! Before it: `management.rs` runs the two commands.
//! After it: `delivery.rs` takes what was fetched last.
//! Thread: the uplink's runtime, in a task of its own. Allocates: per refresh, about once an hour.
//! Invariant: a delivery never fetches; at most one refresh is under way; what was fetched stays in use until a
//! refresh succeeds; every URL kept is on a trusted host.
//! Not here: the order in which resources are used (`ranking.rs`).
//!
//! Source: "How to ingest data without the Kusto.Ingest library", section "Retrieve ingestion resources".

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::Url;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::identity::IdentityIssuer;
use super::management::{Endpoint, NO_DATABASE, Rows};
use super::token::TokenCache;
use super::trusted::{Role, TrustedHosts};
use crate::error::{Remedy, UploadError, UploadStep};
use crate::limits::{
    RESOURCE_COUNT_MAX, RESOURCE_REFRESH_AGE, RESOURCE_REQUEST_PAUSE, RESOURCE_RETRY_PAUSE_MAX,
    RESOURCE_RETRY_PAUSE_MIN, RESOURCE_WAIT,
};
use crate::secret::{SasUrl, Secret};

/// Where blobs and messages go, and what the messages prove.
pub struct Resources {
    /// At least one.
    pub containers: Vec<SasUrl>,
    /// At least one.
    pub queues: Vec<SasUrl>,
    pub identity_token: Secret,
    /// Counts the refreshes that succeeded.
    pub generation: u64,
}

/// What the last refresh left.
#[derive(Clone, Default)]
struct State {
    resources: Option<Arc<Resources>>,
    /// Why the last refresh failed, if it did.
    error: Option<UploadError>,
}

/// What the background task counts.
#[derive(Debug, Default)]
pub struct RefreshMetrics {
    pub refreshes: AtomicU64,
    pub refresh_failures: AtomicU64,
}

/// The resources as deliveries see them.
pub struct ResourceCache {
    state: watch::Sender<State>,
    requested: Notify,
    pub metrics: RefreshMetrics,
}

impl ResourceCache {
    pub fn new() -> Self {
        ResourceCache {
            state: watch::Sender::default(),
            requested: Notify::new(),
            metrics: RefreshMetrics::default(),
        }
    }

    /// What was fetched last. Waits only while nothing was ever fetched, and for a bounded time.
    pub async fn current(&self) -> Result<Arc<Resources>, UploadError> {
        let mut state = self.state.subscribe();
        let first = state.wait_for(|state| state.resources.is_some() || state.error.is_some());
        let Ok(Ok(state)) = tokio::time::timeout(RESOURCE_WAIT, first).await else {
            return Err(UploadError {
                remedy: Remedy::Retry { after: None },
                step: UploadStep::Resources,
                code: "resources_pending".into(),
                detail: "the first ingestion resources are still being fetched".into(),
            });
        };
        match (&state.resources, &state.error) {
            (Some(resources), _) => Ok(resources.clone()),
            (None, Some(error)) => Err(error.clone()),
            (None, None) => unreachable!("waited for one of the two"),
        }
    }

    /// Waits for resources newer than those of `generation`.
    pub async fn newer_than(&self, generation: u64) {
        let mut state = self.state.subscribe();
        let newer = state.wait_for(|state| {
            let resources = state.resources.as_ref();
            resources.is_some_and(|resources| resources.generation > generation)
        });
        // The sender is a part of this cache, so it is there.
        let _ = newer.await;
    }

    /// Why the last refresh failed; nothing where it did not.
    pub fn error(&self) -> Option<UploadError> {
        self.state.borrow().error.clone()
    }

    /// Asks for a refresh now: something was refused that only new resources can cure.
    pub fn request(&self) {
        self.requested.notify_one();
    }

    fn succeed(&self, mut resources: Resources) -> Arc<Resources> {
        self.metrics.refreshes.fetch_add(1, Ordering::Relaxed);
        let before = self.state.borrow().resources.clone();
        resources.generation = before.map_or(0, |before| before.generation) + 1;
        let resources = Arc::new(resources);
        self.state.send_replace(State {
            resources: Some(resources.clone()),
            error: None,
        });
        resources
    }

    fn fail(&self, error: UploadError) {
        self.metrics
            .refresh_failures
            .fetch_add(1, Ordering::Relaxed);
        self.state.send_modify(|state| state.error = Some(error));
    }
}

impl Default for ResourceCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Fetches resources.
pub struct Refresher {
    pub endpoint: Arc<Endpoint>,
    pub tokens: TokenCache<IdentityIssuer>,
}

impl Refresher {
    /// Refreshes for ever: when what there is grows old, when somebody asks, and sooner where it failed.
    pub async fn run(self: Arc<Self>, cache: Arc<ResourceCache>, fetched: impl Fn(&Resources)) {
        let mut retry_pause = RESOURCE_RETRY_PAUSE_MIN;
        loop {
            // Until the next refresh, and what not even a delivery that asks for one can shorten.
            let (pause, pause_asked) = match self.fetch().await {
                Ok(resources) => {
                    let resources = cache.succeed(resources);
                    fetched(&resources);
                    tracing::info!(
                        containers = resources.containers.len(),
                        queues = resources.queues.len(),
                        "ingestion resources are fetched"
                    );
                    retry_pause = RESOURCE_RETRY_PAUSE_MIN;
                    (RESOURCE_REFRESH_AGE.mul_f64(jitter(0.1)), Duration::ZERO)
                }
                Err(error) => {
                    let asked = match error.remedy {
                        Remedy::Retry { after } => after.unwrap_or_default(),
                        _ => Duration::ZERO,
                    };
                    let pause = retry_pause.mul_f64(jitter(0.5)).max(asked);
                    retry_pause = (retry_pause * 2).min(RESOURCE_RETRY_PAUSE_MAX);
                    tracing::warn!(%error, ?pause, "ingestion resources are not fetched; what there is stays in use");
                    cache.fail(error);
                    (pause, asked)
                }
            };
            let ended_at = Instant::now();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = cache.requested.notified() => {
                    // Many deliveries may be refused by what one refresh will cure.
                    let least = pause.min(RESOURCE_REQUEST_PAUSE).max(pause_asked);
                    tokio::time::sleep_until(ended_at + least).await;
                }
            }
        }
    }

    /// Fetches once. A token that is refused is renewed once.
    pub async fn fetch(&self) -> Result<Resources, UploadError> {
        let rows = self.command(".get ingestion resources").await?;
        let (containers, queues) = read_resources(&rows, self.endpoint.trusted())?;
        let rows = self.command(".get kusto identity token").await?;
        Ok(Resources {
            containers,
            queues,
            identity_token: read_identity_token(&rows)?,
            generation: 0,
        })
    }

    async fn command(&self, command: &str) -> Result<Rows, UploadError> {
        let step = UploadStep::Resources;
        let token = self.tokens.token().await?;
        let first = self.endpoint.command(&token, NO_DATABASE, command, step);
        let error = match first.await {
            Err(failed) if failed.error.remedy == Remedy::Refresh => failed.error,
            other => return Ok(other?),
        };
        tracing::info!(%error, "the token was refused; another is taken");
        self.tokens.reject(&token).await;
        let token = self.tokens.token().await?;
        let second = self.endpoint.command(&token, NO_DATABASE, command, step);
        second.await.map_err(|failed| match failed.error.remedy {
            // A new token is refused like the old one: that is no matter of tokens.
            Remedy::Refresh => UploadError {
                remedy: Remedy::Park,
                ..failed.error
            },
            _ => failed.error,
        })
    }
}

/// 1, give or take `part`.
fn jitter(part: f64) -> f64 {
    1.0 - part + 2.0 * part * fastrand::f64()
}

fn unreadable(detail: String) -> UploadError {
    UploadError {
        remedy: Remedy::Retry { after: None },
        step: UploadStep::Resources,
        code: "answer_unreadable".into(),
        detail,
    }
}

/// Containers and queues; other types are for other clients.
fn read_resources(
    rows: &Rows,
    trusted: &TrustedHosts,
) -> Result<(Vec<SasUrl>, Vec<SasUrl>), UploadError> {
    let (mut containers, mut queues) = (Vec::new(), Vec::new());
    let mut refused = None;
    let texts = rows
        .texts(["ResourceTypeName", "StorageRoot"])
        .map_err(unreadable)?;
    for [kind, root] in texts {
        let list = match kind {
            "TempStorage" => &mut containers,
            "SecuredReadyForAggregationQueue" => &mut queues,
            _ => continue,
        };
        if list.len() == RESOURCE_COUNT_MAX {
            continue;
        }
        match storage_root(root, trusted) {
            Ok(root) => list.push(root),
            Err(why) => refused = Some(why),
        }
    }
    if let Some(why) = &refused {
        tracing::warn!(why, "an ingestion resource is not used");
    }
    if containers.is_empty() || queues.is_empty() {
        let (remedy, detail) = match refused {
            Some(why) => (Remedy::Park, why),
            None => {
                let detail = "the service names no container or no queue to ingest through";
                (Remedy::Retry { after: None }, detail.into())
            }
        };
        return Err(UploadError {
            remedy,
            step: UploadStep::Resources,
            code: "resources_missing".into(),
            detail,
        });
    }
    Ok((containers, queues))
}

/// A container's or queue's URL, on a trusted host and with a name. Nothing of its query is repeated.
fn storage_root(root: &str, trusted: &TrustedHosts) -> Result<SasUrl, String> {
    let url = Url::parse(root).map_err(|_| "a resource that is not a URL".to_owned())?;
    let checked = trusted.check(&url, Role::Storage);
    checked.map_err(|untrusted| untrusted.to_string())?;
    let has_user = !url.username().is_empty() || url.password().is_some();
    if url.path().trim_matches('/').is_empty() || has_user || url.fragment().is_some() {
        let host = url.host_str().unwrap_or_default();
        return Err(format!(
            "a resource of {host} that names no container or queue"
        ));
    }
    Ok(SasUrl::new(root))
}

fn read_identity_token(rows: &Rows) -> Result<Secret, UploadError> {
    let mut texts = rows.texts(["AuthorizationContext"]).map_err(unreadable)?;
    match (texts.next(), texts.next()) {
        (Some([token]), None) if !token.trim().is_empty() => Ok(Secret::new(token)),
        _ => Err(unreadable(
            "the identity token is not one row with a text".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(columns: &[&str], rows: &[&[&str]]) -> Rows {
        Rows::of(columns, rows)
    }

    fn trusted() -> TrustedHosts {
        let endpoint = "https://ingest-c.westeurope.kusto.windows.net".parse();
        TrustedHosts::of(&endpoint.unwrap(), &[]).unwrap()
    }

    const QUEUE: &str = "https://k.queue.core.windows.net/q?sp=a&sig=canary";
    const CONTAINER: &str = "https://k.blob.core.windows.net/c?sp=rw&sig=canary";

    #[test]
    fn resources_are_read_by_name_and_unknown_types_are_for_others() {
        let long = format!(
            "https://a.z37.blob.storage.azure.net/c?sig={}",
            "x".repeat(5000)
        );
        let rows = rows(
            &["StorageRoot", "Added", "ResourceTypeName"],
            &[
                &[QUEUE, "", "SecuredReadyForAggregationQueue"],
                &[
                    "https://k.table.core.windows.net/t?sig=x",
                    "",
                    "IngestionsStatusTable",
                ],
                &[CONTAINER, "", "TempStorage"],
                &[&long, "", "TempStorage"],
                &["whatever", "", "BrandNewThing"],
            ],
        );
        let (containers, queues) = read_resources(&rows, &trusted()).unwrap();
        assert_eq!(*queues[0].expose(), QUEUE);
        assert_eq!(*containers[0].expose(), CONTAINER);
        assert_eq!(*containers[1].expose(), long);
        assert_eq!((containers.len(), queues.len()), (2, 1));
    }

    #[test]
    fn a_resource_on_a_foreign_host_is_not_used() {
        for root in [
            "https://evil.example/c?sig=canary",
            "http://k.blob.core.windows.net/c?sig=canary",
            "https://k.blob.core.windows.net/?sig=canary",
            "https://u:p@k.blob.core.windows.net/c?sig=canary",
            "canary",
        ] {
            let one = |container: &str| {
                let names = ["ResourceTypeName", "StorageRoot"];
                let queue = ["SecuredReadyForAggregationQueue", QUEUE];
                rows(
                    &names,
                    &[&queue, &["TempStorage", root], &["TempStorage", container]],
                )
            };
            let (containers, _) = read_resources(&one(CONTAINER), &trusted()).unwrap();
            assert_eq!(containers.len(), 1, "{root}");
            let error = read_resources(&one(root), &trusted()).unwrap_err();
            assert_eq!(error.remedy, Remedy::Park, "{root}");
            assert!(!format!("{error:?}").contains("canary"), "{error}");
        }
        let empty = rows(&["ResourceTypeName", "StorageRoot"], &[]);
        let error = read_resources(&empty, &trusted()).unwrap_err();
        assert_eq!(error.remedy, Remedy::Retry { after: None });
    }

    #[test]
    fn an_identity_token_is_one_row_with_a_text() {
        let read =
            |values: &[&[&str]]| read_identity_token(&rows(&["AuthorizationContext"], values));
        assert_eq!(read(&[&["canary=="]]).unwrap().expose(), "canary==");
        for values in [&[][..], &[&[" "][..]], &[&["a"][..], &["b"]]] {
            assert!(read(values).is_err());
        }
        assert!(read_identity_token(&rows(&["Other"], &[&["x"]])).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_fetched_stays_in_use_while_a_refresh_fails() {
        let resources = || Resources {
            containers: vec![SasUrl::new(CONTAINER)],
            queues: vec![SasUrl::new(QUEUE)],
            identity_token: Secret::new("t"),
            generation: 0,
        };
        let cache = ResourceCache::new();
        // Time is paused: the wait passes at once.
        let pending = cache.current().await.err().unwrap();
        assert_eq!(pending.code, "resources_pending");
        let down = unreadable("down".into());
        cache.fail(down.clone());
        assert_eq!(cache.current().await.err(), Some(down.clone()));
        cache.succeed(resources());
        assert_eq!(cache.error(), None);
        cache.fail(down);
        assert_eq!(cache.current().await.unwrap().generation, 1);
        assert!(cache.error().is_some());
        let (second, ()) = tokio::join!(async { cache.succeed(resources()) }, cache.newer_than(1));
        assert_eq!(second.generation, 2);
    }
}
