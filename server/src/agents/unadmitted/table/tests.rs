use std::{net::Ipv4Addr, time::Duration};

use proptest::prelude::*;
use tokio::time::{advance, timeout};

use super::{
    peers::{CROWD_EXCESS, CROWD_TIME},
    *,
};
use crate::{
    backends::{self, Backends},
    testing::metric,
};

const LIMIT: usize = 16;

fn table() -> Arc<UnadmittedTable> {
    Arc::new(UnadmittedTable::with_limit(LIMIT, Arc::new(ServerMetrics::new().unwrap())))
}

fn address(number: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, number).into()
}

impl UnadmittedTable {
    async fn enter_from(self: &Arc<Self>, number: u8, progress: Progress) -> Place {
        self.try_enter_from(number, progress).await.unwrap()
    }

    async fn try_enter_from(
        self: &Arc<Self>,
        number: u8,
        progress: Progress,
    ) -> Result<Place, NoRoom> {
        self.enter(address(number), Carrier::Tcp, progress).await
    }

    async fn enter_times(self: &Arc<Self>, number: u8, times: usize) -> Vec<Place> {
        let mut places = Vec::new();
        for _ in 0..times {
            places.push(self.enter_from(number, Progress::Silent).await);
        }
        places
    }

    fn count(&self) -> usize {
        self.peers.lock().len()
    }
}

/// Which of these were asked to give way.
fn gave_way(places: &[Place]) -> Vec<bool> {
    places.iter().map(|place| place.gives_way.is_cancelled()).collect()
}

fn evicted(places: &[Place]) -> usize {
    gave_way(places).into_iter().filter(|evicted| *evicted).count()
}

#[tokio::test]
async fn the_oldest_peer_of_the_fullest_source_gives_way() {
    let table = table();
    let few = table.enter_times(1, 5).await;
    let many = table.enter_times(2, LIMIT - 5).await;
    assert_eq!(evicted(&few) + evicted(&many), 0);
    let newcomer = table.enter_from(3, Progress::Silent).await;
    assert_eq!(evicted(&few), 0);
    assert_eq!(gave_way(&many)[..2], [true, false]);
    assert!(!newcomer.gives_way.is_cancelled());
    assert_eq!((evicted(&many), table.count()), (1, LIMIT));
}

#[tokio::test]
async fn a_peer_that_has_proved_more_gives_way_later() {
    let table = table();
    let mut places = table.enter_times(1, LIMIT).await;
    places[0].set_progress(Progress::Connected);
    places[1].set_progress(Progress::Heard);
    let newcomers = table.enter_times(1, 2).await;
    assert_eq!(gave_way(&places)[..5], [false, false, true, true, false]);
    drop((places.split_off(2), newcomers));
    let _silent = table.enter_times(1, LIMIT).await;
    assert_eq!(gave_way(&places), [false, false]);
}

/// Peers of as many sources as there is room for, and no more.
async fn crowd(table: &Arc<UnadmittedTable>, progress: Progress) -> Vec<Place> {
    let mut places = Vec::new();
    for number in 0..LIMIT as u8 {
        match table.try_enter_from(100 + number, progress).await {
            Ok(place) => places.push(place),
            Err(NoRoom) => break,
        }
    }
    places
}

#[tokio::test(start_paused = true)]
async fn peers_of_a_crowd_have_a_second_before_they_give_way() {
    let table = table();
    let places = crowd(&table, Progress::Heard).await;
    assert_eq!(places.len(), LIMIT);
    advance(CROWD_TIME - Duration::from_millis(1)).await;
    assert_eq!(table.try_enter_from(1, Progress::Heard).await.unwrap_err(), NoRoom);
    assert_eq!((evicted(&places), table.count()), (0, LIMIT));
    let _proved_more = table.enter_from(1, Progress::Connected).await;
    advance(Duration::from_millis(1)).await;
    let _later = table.enter_from(2, Progress::Heard).await;
    assert_eq!(gave_way(&places)[..3], [true, true, false]);
}

#[tokio::test(start_paused = true)]
async fn of_a_crowd_those_give_way_that_have_had_their_time() {
    let table = table();
    let places = crowd(&table, Progress::Connected).await;
    advance(CROWD_TIME).await;
    let newcomers =
        [table.enter_from(1, Progress::Silent).await, table.enter_from(2, Progress::Silent).await];
    // They have proved least, and are new.
    assert_eq!(
        (evicted(&newcomers), gave_way(&places)[..3].to_vec()),
        (0, vec![true, true, false])
    );
}

#[tokio::test(start_paused = true)]
async fn a_source_of_agents_within_its_share_takes_the_place_of_a_peer_of_others_at_once() {
    let table = table();
    table.enter_from(1, Progress::Connected).await.admitted();
    let strangers = crowd(&table, Progress::Connected).await;
    // One admission.
    let share = 5;
    let known = table.enter_times(1, share).await;
    assert_eq!((evicted(&strangers), evicted(&known)), (share, 0));
    assert_eq!(table.try_enter_from(1, Progress::Silent).await.unwrap_err(), NoRoom);
    advance(CROWD_TIME).await;
    let _others = table.enter_times(2, 3).await;
    assert_eq!((evicted(&strangers), evicted(&known)), (share + 3, 0));
    // Beyond its share it is like any other.
    advance(CROWD_TIME).await;
    let mut more = Vec::new();
    for _ in 0..2 * LIMIT {
        more.extend(table.try_enter_from(1, Progress::Silent).await);
    }
    assert!(more.len() - evicted(&more) <= share + CROWD_EXCESS + 1);
    assert!(evicted(&strangers) < strangers.len());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_lost_its_tunnel_is_remembered_for_an_hour() {
    for (minutes, is_known) in [(59, true), (61, false)] {
        let table = table();
        table.remember(address(1));
        advance(Duration::from_secs(minutes * 60)).await;
        let known = table.enter_from(1, Progress::Silent).await;
        let _strangers = crowd(&table, Progress::Silent).await;
        advance(CROWD_TIME).await;
        let _newcomer = table.enter_from(2, Progress::Silent).await;
        assert_eq!(known.gives_way.is_cancelled(), !is_known, "{minutes}");
    }
}

#[tokio::test]
async fn a_peer_that_gave_way_counts_until_its_connection_has_ended() {
    let table = table();
    let mut places = table.enter_times(1, LIMIT + MAX_LEAVING).await;
    assert_eq!((evicted(&places), table.count()), (MAX_LEAVING, LIMIT));
    let mut next = std::pin::pin!(table.enter_from(2, Progress::Silent));
    timeout(Duration::ZERO, next.as_mut()).await.unwrap_err();
    drop(places.remove(0));
    let next = next.await;
    assert_eq!((evicted(&places), table.count()), (MAX_LEAVING, LIMIT));
    drop((next, places));
    assert_eq!(table.count(), 0);
}

#[tokio::test]
async fn the_table_is_crowded_from_a_quarter_on() {
    let table = table();
    let mut places = table.enter_times(1, LIMIT / 4 - 1).await;
    assert!(!table.is_crowded());
    places.extend(table.enter_times(2, 1).await);
    assert!(table.is_crowded());
    drop(places);
    assert!(!table.is_crowded());
}

#[tokio::test]
async fn peers_are_counted_by_what_carries_them() {
    let table = table();
    let backends = Backends::new(&[backends::Strategy::Default]);
    let count = |carrier: &str| {
        let name = format!("culvert_server_unadmitted_connections{{transport=\"{carrier}\"}}");
        metric(&table.metrics, &backends, &name)
    };
    let _quic = table.enter(address(1), Carrier::Quic, Progress::Silent).await.unwrap();
    let mut tcp = table.enter_from(1, Progress::Silent).await;
    assert_eq!(["quic", "tcp", "grpc"].map(count), [1.0, 1.0, 0.0]);
    tcp.set_carrier(Carrier::Grpc);
    assert_eq!(["quic", "tcp", "grpc"].map(count), [1.0, 0.0, 1.0]);
    tcp.admitted();
    assert_eq!(["quic", "tcp", "grpc"].map(count), [1.0, 0.0, 0.0]);
}

#[test]
fn the_table_leaves_most_descriptors_to_others() {
    let limit = |descriptors| {
        UnadmittedTable::new(descriptors, Arc::new(ServerMetrics::new().unwrap())).limit
    };
    assert_eq!([70, 256, 1024, 65_536, u64::MAX].map(limit), [17, 64, 256, 1024, 1024]);
}

/// A step of a script.
#[derive(Clone, Debug)]
enum Step {
    /// A peer enters from this source.
    Enter(u8, Progress),
    /// An agent enters from a source that is known, and leaves.
    EnterHonest,
    /// A peer leaves without admission.
    Leave(prop::sample::Index),
    /// A peer makes progress.
    Progress(prop::sample::Index, Progress),
}

fn progress() -> impl Strategy<Value = Progress> {
    prop::sample::select(vec![Progress::Silent, Progress::Heard, Progress::Connected])
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        // A few sources that flood, and others.
        6 => (prop_oneof![0..3u8, 0..40u8], progress()).prop_map(|(from, progress)| {
            Step::Enter(from, progress)
        }),
        1 => Just(Step::EnterHonest),
        1 => any::<prop::sample::Index>().prop_map(Step::Leave),
        1 => (any::<prop::sample::Index>(), progress())
            .prop_map(|(which, progress)| Step::Progress(which, progress)),
    ]
}

/// Number of peers of the source that has most.
fn fullest(places: &[Place]) -> usize {
    let of = |source| places.iter().filter(|place| place.source == source).count();
    places.iter().map(|place| of(place.source)).max().unwrap_or(0)
}

proptest! {
    #[test]
    fn the_bound_holds_and_an_honest_source_stays(steps in prop::collection::vec(step(), 0..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let table = table();
            let mut places: Vec<Place> = Vec::new();
            table.enter_from(200, Progress::Connected).await.admitted();
            // Agents that are known, and were here before the flood.
            let honest = table.enter_times(200, 3).await;
            for step in steps {
                match step {
                    Step::Enter(from, progress) => {
                        match table.try_enter_from(from, progress).await {
                            Ok(place) => places.push(place),
                            Err(NoRoom) => assert!(fullest(&places) <= CROWD_EXCESS),
                        }
                    }
                    Step::EnterHonest => drop(table.enter_from(200, Progress::Silent).await),
                    Step::Leave(which) if !places.is_empty() => {
                        places.swap_remove(which.index(places.len()));
                    }
                    Step::Progress(which, progress) if !places.is_empty() => {
                        let which = which.index(places.len());
                        places[which].set_progress(progress);
                    }
                    Step::Leave(..) | Step::Progress(..) => {}
                }
                places.retain(|place| !place.gives_way.is_cancelled());
                assert!(table.count() <= LIMIT);
                assert_eq!(table.count(), places.len() + honest.len());
                assert_eq!(evicted(&honest), 0);
            }
        });
    }
}
