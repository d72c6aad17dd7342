// The strongest usual alternative that we know: Go's net/http, redigo, and one fused script.
//
// It decides as ours does (replay, rate, stock, the order itself) but keeps only what is in Redis:
// nothing is carried into a database, and there is no limit for addresses and no cap per user.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	rateLimit     = 5
	rateWindowMs  = 60_000
	keyLifeMs     = 24 * 60 * 60 * 1000
	maxBody       = 16 << 10
	maxSafe       = 1<<53 - 1
	poolSize      = 64
	answerSoldOut = `{"error":"Stock problem"}`
)

// KEYS: rate, stock, order ids, outbox, counters, idempotency key or nothing.
// ARGV: user, product, quantity, limit, window, life of a key.
var claim = redis.NewScript(-1, `
local earlier = KEYS[6] and redis.call('GET', KEYS[6])
if earlier then return {'replayed', tonumber(earlier)} end
local attempts = redis.call('INCR', KEYS[1])
if attempts == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[5]) end
if attempts > tonumber(ARGV[4]) then return {'limited', 0} end
local stock = tonumber(redis.call('GET', KEYS[2]) or 0)
local quantity = tonumber(ARGV[3])
if stock < quantity then return {'sold_out', 0} end
redis.call('DECRBY', KEYS[2], quantity)
local id = redis.call('INCR', KEYS[3])
redis.call('RPUSH', KEYS[4], id .. ' ' .. ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
redis.call('HINCRBY', KEYS[5], 'sold', quantity)
if KEYS[6] then redis.call('SET', KEYS[6], id, 'PX', ARGV[6]) end
return {'accepted', id}
`)

type purchase struct {
	UserID    int64  `json:"userId"`
	ProductID int64  `json:"productId"`
	Quantity  *int64 `json:"quantity"`
}

type shop struct{ pool *redis.Pool }

func answer(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write([]byte(body))
}

func (s *shop) buy(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		answer(w, http.StatusMethodNotAllowed, `{"error":"Method not allowed"}`)
		return
	}
	var wanted purchase
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&wanted)
	quantity := int64(1)
	if wanted.Quantity != nil {
		quantity = *wanted.Quantity
	}
	if err != nil || wanted.UserID < 1 || wanted.UserID > maxSafe ||
		wanted.ProductID < 1 || wanted.ProductID > maxSafe || quantity < 1 {
		answer(w, http.StatusBadRequest, `{"error":"Invalid request"}`)
		return
	}
	user, product := strconv.FormatInt(wanted.UserID, 10), strconv.FormatInt(wanted.ProductID, 10)
	args := redis.Args{}
	keys := []string{"rate:" + user, "stock:" + product, "order-ids", "outbox", "product:" + product}
	if key := r.Header.Get("Idempotency-Key"); key != "" {
		keys = append(keys, "key:"+user+":"+key)
	}
	args = args.Add(len(keys)).AddFlat(keys)
	args = args.Add(user, product, quantity, rateLimit, rateWindowMs, keyLifeMs)
	connection := s.pool.Get()
	reply, err := redis.Values(claim.Do(connection, args...))
	_ = connection.Close()
	if err != nil || len(reply) != 2 {
		answer(w, http.StatusServiceUnavailable, `{"error":"Service unavailable"}`)
		return
	}
	outcome, _ := redis.String(reply[0], nil)
	id, _ := redis.Int64(reply[1], nil)
	switch outcome {
	case "accepted", "replayed":
		answer(w, http.StatusOK, fmt.Sprintf(`{"status":"queued","orderId":%d}`, id))
	case "limited":
		answer(w, http.StatusTooManyRequests, `{"error":"Too many requests"}`)
	default:
		answer(w, http.StatusConflict, answerSoldOut)
	}
}

// metrics has the members that the benchmark reads; what is sold counts as stored, since nothing more is done.
func (s *shop) metrics(w http.ResponseWriter, r *http.Request) {
	product := r.URL.Query().Get("productId")
	if product == "" {
		product = "1"
	}
	connection := s.pool.Get()
	defer connection.Close()
	stock, stockErr := redis.Int64(connection.Do("GET", "stock:"+product))
	sold, soldErr := redis.Int64(connection.Do("HGET", "product:"+product, "sold"))
	if stockErr != nil || (soldErr != nil && soldErr != redis.ErrNil) {
		answer(w, http.StatusServiceUnavailable, `{"error":"Service unavailable"}`)
		return
	}
	answer(w, http.StatusOK, fmt.Sprintf(
		`{"stock_remaining":%d,"queue_depth":0,"total_processed":%d}`, stock, sold))
}

func main() {
	socket := strings.TrimPrefix(os.Getenv("REDIS_URL"), "unix://")
	pool := &redis.Pool{
		MaxIdle:   poolSize,
		MaxActive: poolSize,
		Wait:      true,
		Dial:      func() (redis.Conn, error) { return redis.Dial("unix", socket) },
	}
	if stock := os.Getenv("STOCK"); stock != "" {
		connection := pool.Get()
		if _, err := connection.Do("SET", "stock:1", stock); err != nil {
			log.Fatal(err)
		}
		_ = connection.Close()
	}
	s := &shop{pool}
	routes := http.NewServeMux()
	routes.HandleFunc("/purchase", s.buy)
	routes.HandleFunc("/purchase/metrics", s.metrics)
	server := &http.Server{
		Addr:              "127.0.0.1:" + os.Getenv("PORT"),
		Handler:           routes,
		ReadHeaderTimeout: 10 * time.Second,
	}
	log.Fatal(server.ListenAndServe())
}
